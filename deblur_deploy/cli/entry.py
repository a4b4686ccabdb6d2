"""The console scripts.  They import a command only when it is called, so that a missing extra is one line too.

Commands import what is heavy only where it is needed, so an extra may turn out to be missing later as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from deblur_deploy.cli.common import USER_ERROR

_EXTRAS = {"bench": "cpu,export", "export": "cpu,export", "run": "cpu", "serve": "cpu,serve", "train": "train"}


def _script(name: str) -> Callable[[], int]:
    def main() -> int:
        try:
            status: int = import_module(f"deblur_deploy.cli.{name}").main()
        except ImportError as error:
            missing = (error.name or str(error)).partition(".")[0]
            sys.stderr.write(
                f"deblur-{name}: {missing} is not installed; pip install 'deblur-deploy[{_EXTRAS[name]}]'\n"
            )
            return USER_ERROR
        return status

    return main


bench, export, run, serve, train = (_script(name) for name in ("bench", "export", "run", "serve", "train"))
