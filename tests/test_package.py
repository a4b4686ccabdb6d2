"""The wheel and the source distribution: what is in them, and that both say one version."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import deblur_deploy

ROOT = Path(__file__).parents[1]
MODELS = {
    "README.md", "hd.safetensors", "hd/README.md", "hd/bundle.json", "hd/recipe.toml", "hd/report.html",
    "hd/float.onnx", "hd/fp16.onnx", "hd/fp32.onnx", "hd/int8-planes.onnx", "hd/int8.onnx",
}  # fmt: skip
BUNDLES = {f"hd-quarter/{path.name}" for path in (ROOT / "models" / "hd-quarter").glob("*")}
DATA = {"py.typed", "evaluation/templates/page.html.j2", "pipeline/templates/card.md.j2"}
"""Files of the package that are no Python."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install 'deblur-deploy[test]'")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_the_wheel_holds_the_package_and_the_shipped_bundle_only(built):
    version = deblur_deploy.__version__
    (path,) = built.glob("*.whl")
    assert path.name == f"deblur_deploy-{version}-py3-none-any.whl"
    package = ROOT / "deblur_deploy"
    python = {source.relative_to(package).as_posix() for source in package.rglob("*.py")}
    about = {f"deblur_deploy-{version}.dist-info/{name}" for name in (
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"
    )}  # fmt: skip
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        entries = wheel.read(f"deblur_deploy-{version}.dist-info/entry_points.txt").decode()
        metadata = wheel.read(f"deblur_deploy-{version}.dist-info/METADATA").decode()
    assert names == about | {
        f"deblur_deploy/{name}" for name in python | DATA | {f"models/{m}" for m in MODELS | BUNDLES}
    }
    for command in ("bench", "export", "run", "serve", "train"):
        assert f"deblur-{command} = deblur_deploy.cli.entry:{command}" in entries
    assert f"\nVersion: {version}\n" in metadata
    assert "# deblur_deploy\n" in metadata


@pytest.mark.parametrize("there", [True, False])
def test_a_small_bundle_ships_if_there_is_one_and_stays_small(there, tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE", "deblur_deploy/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shipped = ["README.md", "hd.safetensors", "hd/bundle.json", *(["hd-quarter/bundle.json"] if there else [])]
    for name in (*shipped, "hd-half.safetensors", "hd-half/bundle.json", "hd-quarter.safetensors"):
        (tmp_path / "models" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "models" / name).touch()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "dist"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if "models/" in name}
    assert names == {f"deblur_deploy/models/{name}" for name in shipped}
    small = ROOT / "models" / "hd-quarter"
    assert sum(path.stat().st_size for path in small.glob("*")) <= 12e6


def test_the_source_distribution_can_be_tested_and_documented(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", "mkdocs.yml", "docs/index.md",
        "tests/test_package.py", "benchmarks/report.py", "benchmarks/results/latency.json", "models/hd/int8.onnx",
    ):  # fmt: skip
        assert name in names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".git/", "runs/", "site/"))]
