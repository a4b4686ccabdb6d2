"""What every command shares: a user's mistake is one line and exit status 2, never a traceback."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence

from deblur_deploy.errors import DeblurError

OK, SOME_FAILED, USER_ERROR, INTERRUPTED, CLOSED = 0, 1, 2, 130, 141
"""The last two as shells count them: 128 and the signal's number."""


def guarded(name: str, command: Callable[[Sequence[str] | None], int]) -> Callable[[], int]:
    """A console-script ``main`` around ``command(argv)``, which returns the exit status."""

    def main() -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # names of files need not be text in this locale
                stream.reconfigure(errors="backslashreplace")
        try:
            return command(None)
        except DeblurError as error:
            sys.stderr.write(f"{name}: {error}\n")
            return USER_ERROR
        except KeyboardInterrupt:
            sys.stderr.write(f"{name}: interrupted; finished files are kept\n")
            return INTERRUPTED
        except BrokenPipeError:
            # Whoever read standard output (head, less) has seen enough; nor must its last flush complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return CLOSED
        except OSError as error:  # a locked file, a full disk: the system's own words say it
            where = f"{error.filename}: " if error.filename else ""
            sys.stderr.write(f"{name}: {where}{error.strerror or error}\n")
            return USER_ERROR

    return main
