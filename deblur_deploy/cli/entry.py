"""The console scripts.  They import a command only when it is called, so that a missing extra is one line too.

Commands import what is heavy only where it is needed, so an extra may turn out to be missing later as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from deblur_deploy.cli.common import USER_ERROR
from deblur_deploy.errors import DeblurError, one_line

_EXTRAS = {"bench": "cpu,export", "export": "cpu,export", "run": "cpu", "serve": "cpu,serve", "train": "cpu,train"}


def _script(name: str) -> Callable[[], int]:
    def main() -> int:
        try:
            # The doctor runs where OpenCV does not.
            module = "doctor" if name == "run" and "--doctor" in sys.argv else name
            status: int = import_module(f"deblur_deploy.cli.{module}").main()
        except (ImportError, AttributeError) as error:
            why = _unusable(error, _EXTRAS[name])
            if not why:
                raise
            sys.stderr.write(f"deblur-{name}: {why}\n")
            return USER_ERROR
        return status

    return main


def _unusable(error: ImportError | AttributeError, extra: str) -> str:
    """What is the matter with a library, and the command that mends it; empty if the error is about something else."""
    missing = (error.name or str(error)).partition(".")[0]
    if isinstance(error, ModuleNotFoundError):
        return f"{missing} is not installed; pip install 'deblur-deploy[{extra}]'"
    if isinstance(error, DeblurError):
        return str(error)
    # Here, since looking through all that is installed takes time.
    from deblur_deploy.wheels import clash, mend

    if "cv2" in (missing, getattr(error.obj, "__name__", "") if isinstance(error, AttributeError) else ""):
        # Libraries of a desktop that are not there, or files of two wheels on top of each other.
        why = f" ({clash('opencv')})" if clash("opencv") else ""
        return f"OpenCV cannot be loaded: {one_line(error)}{why}; {mend('opencv')}"
    return f"{missing} cannot be loaded: {one_line(error)}" if isinstance(error, ImportError) else ""


bench, export, run, serve, train = (_script(name) for name in ("bench", "export", "run", "serve", "train"))
