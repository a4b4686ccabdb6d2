from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from deblur_deploy.evaluation import machine


def test_the_machine_is_named_and_fits_into_json():
    about = machine.machine()
    assert about["processor"]
    assert about["cores"] >= 1
    assert about["memory_gib"] >= 0
    assert json.loads(json.dumps(about)) == about


def test_versions_are_those_that_are_imported():
    import numpy as np
    import onnxruntime as ort

    versions = machine.package_versions()
    assert versions["numpy"] == np.__version__
    assert ort.__version__ in (versions.get("onnxruntime"), versions.get("onnxruntime-gpu"))


def test_the_commit_is_that_of_the_checkout():
    root = Path(machine.__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert head.startswith(machine.commit().rstrip("+"))


def test_gpus_are_what_nvidia_smi_lists(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Some GPU, 80000 MiB, 570.1'\necho 'Other GPU, 10 MiB, 570.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert machine.machine()["gpus"] == ["Some GPU, 80000 MiB, 570.1", "Other GPU, 10 MiB, 570.1"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert "gpus" not in machine.machine()


def test_what_the_host_takes_is_a_share_of_all_time():
    found = machine.stolen_s()
    if found is None:
        pytest.skip("no /proc/stat here")
    stolen, total = found
    assert 0 <= stolen <= total


def test_memory_of_all_gpus_is_summed(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 100\necho 28\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert machine.gpu_memory_mb() == pytest.approx(128 * 2**20 / 1e6)
    tool.write_text("#!/bin/sh\necho '[N/A]'\n")
    assert machine.gpu_memory_mb() is None
