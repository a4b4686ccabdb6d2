"""The console scripts: a missing extra, or what the system refuses, is one line and status 2."""

import io
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from rich.console import Console

from deblur_deploy.cli.common import USER_ERROR, guarded
from deblur_deploy.cli.progress import bar

SCRIPTS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize(
    ("command", "missing"), [("export", "torch"), ("train", "accelerate"), ("run", "cv2"), ("bench", "skimage")]
)
def test_a_missing_extra_is_named_with_the_command_that_brings_it(command, missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\nfrom deblur_deploy.cli import entry; sys.exit(entry.{command}())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"deblur-{command}: {missing} is not installed; pip install 'deblur-deploy[")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_every_script_is_there(script):
    module, name = script.split(":")
    assert callable(getattr(import_module(module), name))


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes of that kind")
def test_a_reader_that_has_seen_enough_ends_a_command_quietly():
    code = """
import os, sys
from deblur_deploy.cli.entry import train
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, sys.stdout.fileno())
sys.argv[1:] = ["--help"]
sys.exit(train())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_systems_own_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as a file that was locked or went away after it was looked at."""
    missing = tmp_path / "none"
    assert guarded("deblur-x", lambda _: len(missing.read_bytes()))() == USER_ERROR
    assert capsys.readouterr().err == f"deblur-x: {missing}: No such file or directory\n"


def test_names_in_a_bar_are_no_markup() -> None:
    shown = io.StringIO()
    with bar(Console(file=shown, force_terminal=True, width=120)) as progress:
        progress.add_task("o [final] [/2].mkv", total=1, rate="")
    assert "o [final] [/2].mkv" in shown.getvalue()
