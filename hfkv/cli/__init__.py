"""The ``hfkv`` command: its entry point, and nothing that takes time to import."""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C ended
_SHOW_CURSOR = b"\x1b[?25h\n"


def main() -> None:
    """Entry point of the console script. Ctrl-C ends it with exit code 130 and without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, _interrupt)
    if os.environ.get("COLUMNS") == "0":
        del os.environ["COLUMNS"]  # what a terminal without a size says; help would be printed in no column
    try:
        from hfkv.cli.commands import app

        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt; ends the process instead where an import is under way.

    There the exception may be lost: torch clears what the import of numpy raises and goes on without it.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), _SHOW_CURSOR)  # a progress bar has hidden it
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt
