"""Failures that end a command with one message and an exit status."""


class CommandError(Exception):
    """Shown as ``orthogonium: error: …``; ``status`` is 2 for wrong usage, 1 for a failure."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status
