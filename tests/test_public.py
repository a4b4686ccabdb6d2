"""The public face, and the direction of imports."""

import builtins
import subprocess
import sys
from pathlib import Path

import pytest

import deblur_deploy
from deblur_deploy import errors


def test_all_is_sorted_and_everything_in_it_is_there():
    assert deblur_deploy.__all__ == sorted(deblur_deploy.__all__)
    for name in deblur_deploy.__all__:
        assert getattr(deblur_deploy, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = deblur_deploy.nothing


def test_every_error_is_also_the_builtin_it_stands_for():
    leaves = [value for value in vars(errors).values() if isinstance(value, type) and value is not errors.DeblurError]
    assert len(leaves) >= 8
    for leaf in leaves:
        assert issubclass(leaf, errors.DeblurError)
        assert any(base in vars(builtins).values() for base in leaf.__bases__)


def test_imports_run_one_way():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
