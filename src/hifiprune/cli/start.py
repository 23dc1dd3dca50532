"""Where the command line starts: signals are handled before anything that takes time is imported."""

import sys

from hifiprune.cli.signals import Stopped, handle_signals


def main() -> None:
    """Run the command line."""
    try:
        handle_signals()
        from hifiprune.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(f"error: {Stopped()}")
    except Stopped as stopped:
        sys.exit(f"error: {stopped}")
    run()
