"""OpenCV as other people's environments have it: too old, broken, or two wheels on top of each other.

Each is a package folder in front of the real one, with the ``.dist-info`` of the wheels that are said to be installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deblur_deploy.media.opencv import OLDEST

WHEELS = ("opencv-python", "opencv-python-headless")
OLD = "__version__ = '4.12.0'"
HALF = "imread = imwrite = None"
NO_GL = "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory', name='cv2')"
MIXED = "import sys; sys.modules[__name__].dnn.blobFromImage"
CALL = "import sys; from deblur_deploy.cli import entry; sys.exit(entry.{}())"


def call(folder: Path, content: str, wheels: tuple[str, ...], command: str, *arguments: object) -> tuple[int, str, str]:
    (folder / "cv2").mkdir()
    (folder / "cv2" / "__init__.py").write_text(content)
    for name in WHEELS:
        about = folder / f"{name.replace('-', '_')}-4.10.0.dist-info"
        about.mkdir()
        # The real one is hidden by one that has no name of the family.
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name if name in wheels else 'x'}\nVersion: 4.10.0\n"
        )
    code = (
        "import importlib.metadata as m; m.distributions = lambda: m.Distribution.discover(path=["
        + repr(str(folder))
        + "])"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{CALL.format(command)}", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("content", "wheels", "says"),
    [
        (OLD, WHEELS, "OpenCV 4.12.0 is too old, 4.13 or later is needed (opencv-python and opencv-python-headl"),
        (OLD, WHEELS[:1], "OpenCV 4.12.0 is too old, 4.13 or later is needed; "),
        (HALF, WHEELS, "OpenCV without a version lacks IMAGE_METADATA_EXIF (opencv-python and opencv-python-headless"),
        (NO_GL, WHEELS[:1], "OpenCV cannot be loaded: libGL.so.1: cannot open shared object file"),
        (MIXED, WHEELS, "opencv-python and opencv-python-headless overwrite each other's files"),
    ],
)
@pytest.mark.parametrize("command", ["run", "bench"])
def test_a_command_says_it_in_one_line(
    tmp_path: Path, content: str, wheels: tuple[str, ...], says: str, command: str
) -> None:
    status, _, said = call(tmp_path, content, wheels, command)
    assert status == 2
    assert says in said
    assert f"pip uninstall -y {' '.join(wheels)} && pip install opencv-python-headless" in said
    assert said.startswith(f"deblur-{command}: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("content", "wheels"), [(OLD, WHEELS), (NO_GL, WHEELS[:1]), (MIXED, WHEELS)])
def test_the_doctor_runs_all_the_same(tmp_path: Path, bundle: Path, content: str, wheels: tuple[str, ...]) -> None:
    status, shown, said = call(tmp_path, content, wheels, "run", "--doctor", "--model", bundle)
    assert (status, said) == (0, "")
    assert f"-> pip uninstall -y {' '.join(wheels)} && pip install opencv-python-headless\n" in shown
    assert "tiny/int8 on" in shown


def test_the_oldest_that_is_allowed_is_the_oldest_that_pip_may_install() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert f"opencv-python-headless>={'.'.join(map(str, OLDEST))}" in project["dependencies"]
