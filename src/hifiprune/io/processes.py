"""Other programs, run to their end."""

import subprocess
from collections.abc import Sequence


def run_program(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program without input, and return what it printed, in UTF-8 whatever the locale, with its exit code.

    Args:
        words: program and its arguments.
    """
    return subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
        errors="replace",
    )
