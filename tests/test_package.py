"""The wheel and the source distribution: what is in them, and that both say one version."""

from __future__ import annotations

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
    assert names == about | {f"deblur_deploy/{name}" for name in python | DATA | {f"models/{m}" for m in MODELS}}
    for command in ("bench", "export", "run", "serve", "train"):
        assert f"deblur-{command} = deblur_deploy.cli.entry:{command}" in entries
    assert f"\nVersion: {version}\n" in metadata
    assert "# deblur_deploy\n" in metadata


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
