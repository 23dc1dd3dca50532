"""What SIGINT and SIGTERM do; it imports nothing that takes time."""


class Stopped(BaseException):
    """The run was asked to end by a signal; no library catches it on the way out."""

    def __init__(self, signal_name: str = "SIGINT"):
        super().__init__(signal_name)

    def __str__(self) -> str:
        remedy = "; ".join(getattr(self, "__notes__", ["give the same command again"]))
        return f"interrupted by {self.args[0]}: no half-written output is left; {remedy}"


def handle_signals() -> None:
    """Have Ctrl-C and SIGTERM raise `Stopped`."""
    import signal

    def stop(number: int, _: object) -> None:
        raise Stopped(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
