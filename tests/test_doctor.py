"""The doctor's cases: what is wrong, and the one command that mends it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime as ort
import pytest

from deblur_deploy import wheels
from deblur_deploy.cli import doctor
from deblur_deploy.cli.doctor import Finding, examine
from deblur_deploy.errors import ProviderError
from deblur_deploy.runtime import providers
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.system import threads
from tests import tiny


def topic(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.topic == name)


def test_where_all_is_well_nothing_is_to_mend(bundle: Path) -> None:
    findings = examine(bundle)
    assert topic(findings, "model").mend is None
    assert topic(findings, "onnxruntime").mend is None
    assert topic(findings, "cpu").text.startswith("present: ")


def test_wheels_that_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [SimpleNamespace(name=name) for name in ("onnxruntime", "onnxruntime-gpu", "numpy", None)]
    monkeypatch.setattr(wheels, "distributions", lambda: installed)
    found = topic(doctor._libraries(), "wheels")
    assert found.text == "onnxruntime and onnxruntime-gpu overwrite each other's files"
    assert found.mend == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


@pytest.mark.parametrize(
    ("installed", "keep"),
    [
        (["opencv-python", "opencv-python-headless"], "opencv-python-headless"),
        (["opencv-contrib-python", "opencv_python"], "opencv-contrib-python-headless"),
    ],
)
def test_one_command_leaves_one_opencv(monkeypatch: pytest.MonkeyPatch, installed: list[str], keep: str) -> None:
    monkeypatch.setattr(wheels, "distributions", lambda: [SimpleNamespace(name=name) for name in installed])
    names = [name.replace("_", "-") for name in installed]
    (found,) = (finding for finding in doctor._libraries() if finding.mend)
    assert found.text == f"{' and '.join(names)} overwrite each other's files"
    assert found.mend == f"pip uninstall -y {' '.join(names)} && pip install {keep}"


def test_an_old_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.9.0")
    assert topic(doctor._libraries(), "onnxruntime").mend == "pip install --upgrade onnxruntime"


@pytest.mark.parametrize(("driver", "mend"), [(True, "pip install 'onnxruntime-gpu[cuda,cudnn]'"), (False, None)])
def test_cuda_without_its_libraries(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, driver: bool, mend: str | None
) -> None:
    there = providers.Provider(name="cuda", ort_name="CUDAExecutionProvider", device="GPU 0", kind="GPU")
    monkeypatch.setattr(doctor.providers, "find", lambda name: there)
    monkeypatch.setattr(doctor.providers, "AUTO", ("cuda",))
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: driver)

    def fail(model: object, name: str) -> bool:
        raise ProviderError("cuda cannot load fp16.onnx: libcublasLt.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "_runs", fail)
    found = topic(doctor._providers(bundle), "cuda")
    assert "libcublasLt" in found.text
    assert found.mend == mend


def test_a_model_that_is_too_new(tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.ir_version = 99
    path.write_bytes(model.SerializeToString())
    found = topic(examine(path), "model")
    assert found.mend == "pip install --upgrade onnxruntime"
    assert "m.onnx" in found.text


def test_more_threads_than_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert not [finding for finding in doctor._machine() if finding.topic == "threads"]
    assert "2 of " in topic(doctor._machine(), "processor").text
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert topic(doctor._machine(), "threads").mend == "export OMP_NUM_THREADS=2"


@pytest.mark.parametrize("module", ["cv2", "av"])
def test_a_missing_library(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == module else object())
    (found,) = (finding for finding in doctor._libraries() if finding.text == f"{module} is not installed")
    assert found.mend is not None
    assert "pip install " in found.mend


def test_a_graph_that_is_shared_is_told(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = DeblurEngine.__dict__["_receipt"]

    def shared(self: DeblurEngine, *arguments: object) -> object:
        made = receipt(self, *arguments)
        object.__setattr__(made, "macs", {made.provider: 0.75, "other": 0.25})
        return made

    monkeypatch.setattr(DeblurEngine, "_receipt", shared)
    told = examine(bundle)[-1]
    assert told.text == "25% of the multiply-accumulates run elsewhere; compare with --provider cpu"
    # It runs, so there is nothing that must be mended.
    assert told.mend is None
