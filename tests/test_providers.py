from __future__ import annotations

import json
import shlex
import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Lock
from time import sleep

import numpy as np
import onnxruntime as ort
import pytest

from deblur_deploy import DeblurEngine
from deblur_deploy.cli import doctor
from deblur_deploy.errors import InputError, MemoryLimitError, ProviderError
from deblur_deploy.runtime import engine as engine_module
from deblur_deploy.runtime import providers, sessions
from deblur_deploy.runtime.providers import Provider
from deblur_deploy.runtime.session import Session
from deblur_deploy.system import hardware, memory, threads
from tests.conftest import noise


@pytest.mark.parametrize("name", ["cuda", "tensorrt", "directml", "coreml"])
def test_a_named_provider_that_is_absent_raises(bundle: Path, name: str) -> None:
    if providers.NAMES[name] in ort.get_available_providers():
        pytest.skip(f"{name} is present")
    with pytest.raises(ProviderError, match=name):
        DeblurEngine(bundle, name)


def test_pip_takes_the_command_that_installs_a_provider() -> None:
    assert shlex.split(providers.install("tensorrt")) == ["pip", "install", "onnxruntime-gpu[cuda,cudnn]", "tensorrt"]
    assert providers.install("directml") == ""


def test_onnxruntimes_own_names_do_too() -> None:
    assert providers.find("CPUExecutionProvider").name == "cpu"
    with pytest.raises(ProviderError):
        providers.find("XnnpackExecutionProvider")
    with pytest.raises(InputError, match="use auto, cpu"):
        providers.find("nonsense")


def test_the_library_would_have_fallen_back_without_a_word(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The trap that ProviderError stands before: this session was asked for CUDA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = ort.InferenceSession(bundle / "fp32.onnx", providers=["CUDAExecutionProvider"])
    if "CUDAExecutionProvider" in session.get_providers():
        pytest.skip("there is a GPU")
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_auto_moves_on_with_one_warning_that_says_why(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = providers.find("cpu")
    broken = Provider(name="cuda", ort_name="CUDAExecutionProvider", device="none", kind="GPU")
    monkeypatch.setattr("deblur_deploy.runtime.engine.candidates", lambda skipped: [broken, cpu])
    with pytest.warns(RuntimeWarning, match="cuda is not used") as caught:
        engine = DeblurEngine(bundle)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert engine.receipt.provider == "cpu"
    assert "cuda" in engine.receipt.skipped


def test_auto_moves_on_from_a_full_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, opened = (
        Provider(name="cuda", ort_name="CUDAExecutionProvider", device="none", kind="GPU"),
        DeblurEngine._open,
    )

    def scarce(self: DeblurEngine, provider: Provider, tuned: str | None = None) -> object:
        if provider is full:
            raise MemoryLimitError("cuda has too little memory")
        return opened(self, provider, tuned)

    cpu = providers.find("cpu")
    monkeypatch.setattr("deblur_deploy.runtime.engine.candidates", lambda skipped: [full, cpu])
    monkeypatch.setattr(DeblurEngine, "_open", scarce)
    with pytest.warns(RuntimeWarning, match="cuda is not used: cuda has too little memory"):
        assert DeblurEngine(bundle).receipt.provider == "cpu"


def test_a_failing_run_is_not_repeated_on_the_cpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = DeblurEngine(bundle, "cpu")
    assert engine._main is not None

    class Broken:
        def run(self, *_: object) -> list[np.ndarray]:
            raise RuntimeError("EP Error: first\nsecond line")

    monkeypatch.setattr(engine._main._any, "bare", Broken())
    with pytest.raises(ProviderError, match=r"cpu failed on .*first$"):
        engine(noise(9, 9, 3))


def test_arithmetic_is_what_runs() -> None:
    def ask(model: str, wish: str, **facts: object) -> str:
        return Provider(**{"ort_name": "", "device": "", **facts}).arithmetic(model, wish)  # type: ignore[arg-type]

    assert ask("fp32", "auto", name="openvino", native_bf16=True) == "bf16"
    assert ask("fp32", "fp32", name="openvino", native_bf16=True) == "fp32"
    assert ask("fp32", "auto", name="openvino", native_bf16=False) == "fp32"
    assert ask("fp32", "auto", name="openvino", kind="GPU") == "fp16"
    assert ask("fp32", "auto", name="cuda", kind="GPU") == "tf32"
    assert ask("fp32", "fp32", name="cuda", kind="GPU") == "fp32"
    assert ask("int8", "auto", name="openvino", native_bf16=True) == "int8"
    assert ask("int8", "auto", name="cuda", kind="GPU") == "tf32"
    assert ask("int8", "auto", name="tensorrt", kind="GPU") == "unknown"


def test_what_providers_are_told() -> None:
    def told(precision: str, fixed: bool, **facts: object) -> dict[str, str]:
        provider = Provider(**{"ort_name": "X", "device": "", **facts})  # type: ignore[arg-type]
        asked = provider.configure(ort.SessionOptions(), precision=precision, threads=3, fixed=fixed, extra={})
        return asked[0][1]

    openvino = told("fp32", True, name="openvino")
    assert json.loads(openvino["load_config"]) == {"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}
    assert openvino["num_of_threads"] == "3"
    assert told("fp32", True, name="cuda", kind="GPU")["use_tf32"] == "0"
    assert told("tf32", False, name="cuda", kind="GPU")["enable_cuda_graph"] == "0"
    assert told("tf32", True, name="cuda", kind="GPU")["cudnn_conv_algo_search"] == "EXHAUSTIVE"


def test_a_swallowed_option_is_refused() -> None:
    with pytest.raises(InputError, match="no option 'num_thread'"):
        providers.find("openvino", {"num_thread": "2"})


def test_a_plugin_without_a_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(providers._PLUGINS, "OpenVINOExecutionProvider", "some_plugin")
    monkeypatch.setattr(providers, "find_spec", lambda name: object())
    monkeypatch.setattr(providers.ort, "get_ep_devices", list)
    monkeypatch.setattr(providers.ort, "register_execution_provider_library", lambda name, path: None)
    monkeypatch.setitem(sys.modules, "some_plugin", types.SimpleNamespace(get_library_path=lambda: "x.so"))
    with pytest.raises(ProviderError, match="only offers itself on Intel"):
        providers.find("openvino")


def system(root: Path, own: str, groups: dict[str, str], meminfo: str = "") -> Path:
    """A file tree as the kernel shows it: ``own`` is /proc/self/cgroup, ``groups`` what lies in /sys/fs/cgroup."""
    files = {f"sys/fs/cgroup/{name}": text for name, text in groups.items()}
    for name, text in {"proc/self/cgroup": own, "proc/meminfo": meminfo, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MIB = 2**20


def group(folder: str, limit: object, used_mib: int, stat: str = "") -> dict[str, str]:
    """A memory control group of version 2."""
    return {
        f"{folder}memory.max": f"{limit}\n",
        f"{folder}memory.current": f"{used_mib * MIB}\n",
        f"{folder}memory.stat": stat,
    }


def group1(folder: str, limit: int, used_mib: int, stat: str = "") -> dict[str, str]:
    """The same of version 1."""
    return {
        f"memory/{folder}memory.limit_in_bytes": f"{limit}\n",
        f"memory/{folder}memory.usage_in_bytes": f"{used_mib * MIB}\n",
        f"memory/{folder}memory.stat": stat,
    }


CACHE = f"anon {5 * MIB}\ninactive_file {3000 * MIB}\ntotal_inactive_file {3000 * MIB}\n"


@pytest.mark.parametrize(
    ("own", "groups", "mib"),
    [
        pytest.param("0::/\n", {}, 8000, id="no limit"),
        pytest.param("0::/\n", group("", "max", 100), 8000, id="v2, no limit"),
        pytest.param("0::/\n", group("", 1000 * MIB, 100), 900, id="v2"),
        pytest.param("0::/\n", group("", 4096 * MIB, 4086, CACHE), 3010, id="v2, full of page cache"),
        pytest.param("0::/\n", group("", 1000 * MIB, 2000), 0, id="v2, beyond its limit"),
        pytest.param(
            "0::/a/b\n",
            {**group("a/b/", "max", 10), **group("a/", 600 * MIB, 100), **group("", 9000 * MIB, 100)},
            500,
            id="v2, the limit is one level up",
        ),
        pytest.param("0::/../elsewhere\n", group("", 700 * MIB, 100), 600, id="v2, named from outside"),
        pytest.param("5:memory:/docker/1\n", group1("", 300 * MIB, 40), 260, id="v1, as seen from inside"),
        pytest.param("5:memory:/a\n0::/\n", group1("a/", 4096 * MIB, 4086, CACHE), 3010, id="v1, page cache"),
        pytest.param("5:memory:/\n", group1("", 0x7FFFFFFFFFFFF000, 40), 8000, id="v1, no limit"),
        pytest.param("", group("", 1000 * MIB, 100), 900, id="no /proc/self/cgroup"),
        pytest.param("nonsense\n", {"memory.max": "x", "memory.current": "", "memory.stat": "y"}, 8000, id="nonsense"),
    ],
)
def test_the_containers_memory(tmp_path: Path, own: str, groups: dict[str, str], mib: int) -> None:
    meminfo = f"MemTotal:       16000000 kB\nMemAvailable:   {8000 * 1024} kB\nHugePages_Free: 0\n"
    assert memory.available_bytes(system(tmp_path, own, groups, meminfo)) == mib * MIB


def test_a_budget_is_a_third_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, mib in ((None, 400), (900 * MIB, 300), (9000 * MIB, 400), (0, 32)):
        monkeypatch.setattr(memory, "available_bytes", lambda free=free: free)
        assert memory.budget_bytes(None) == mib * MIB


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3.0),
        ("0::/a\n", {"cpu.max": "max 100000"}, None),
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
    ],
)
def test_the_containers_quota(tmp_path: Path, own: str, files: dict[str, str], cores: float | None) -> None:
    assert threads.cpu_quota(system(tmp_path, own, files)) == cores


def test_threads_follow_affinity_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for quota, cores in ((None, 8), (2.5, 3), (0.2, 1), (64.0, 8)):
        monkeypatch.setattr(threads, "cpu_quota", lambda quota=quota: quota)
        assert threads.usable_cores() == cores


@pytest.mark.parametrize(("count", "together"), [(None, False), (1, True)])
def test_engines_without_a_thread_count_take_turns(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, count: int | None, together: bool
) -> None:
    engines = [DeblurEngine(bundle, "cpu", threads=count) for _ in range(3)]
    running, most, lock, meeting = 0, 0, Lock(), Barrier(2)

    def slow(session: Session, batch: np.ndarray) -> np.ndarray:
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
        if together:
            with suppress(BrokenBarrierError):
                meeting.wait(5)
        else:
            sleep(0.005)
        with lock:
            running -= 1
        return batch

    monkeypatch.setattr(Session, "__call__", slow)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: engines[i % 3](noise(8, 8, 3)), range(12)))
    assert (most > 1) is together


@pytest.mark.parametrize("lines", ["import deblur_deploy", "import deblur_deploy.runtime.engine"])
def test_nothing_is_printed(bundle: Path, lines: str) -> None:
    use = f"import numpy; deblur_deploy.DeblurEngine({str(bundle)!r})(numpy.zeros((9, 9), 'u1'))"
    code = f"{lines}; {use}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "fp16", "auto"])
def test_cuda_runs_and_agrees(bundle: Path, precision: str) -> None:
    engine, image = DeblurEngine(bundle, "cuda", precision), noise(64, 96, 3)
    assert engine.receipt.macs["cuda"] == 1
    expected = DeblurEngine(bundle, "cpu", "fp32")(image).astype(int)
    for _ in range(4):
        assert np.abs(engine(image) - expected).max() <= (1 if precision == "fp32" else 4)
    assert sessions.MAX_FIXED


def test_a_name_of_onnxruntimes_keeps_its_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: ["XnnpackExecutionProvider"])
    provider = providers.find("xnnpackexecutionprovider")
    # Shares of the graph go by this name too.
    assert provider.name == provider.ort_name == "XnnpackExecutionProvider"


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("cpu:gpu", {}, "no devices to choose from"),
        ("cuda:first", {}, "give a number"),
        ("cpu", {"arena": "1"}, "takes none"),
        ("cuda", {"use_tf32": "0"}, "use precision"),
        ("cuda", {"device_id": "1"}, "cuda:1"),
        ("openvino", {"num_of_threads": "2"}, "use threads"),
        ("openvino", {"device_type": "GPU"}, "openvino:gpu"),
        ("openvino", {"load_config": "CPU"}, "must be JSON"),
        ("openvino", {"load_config": '{"CPU": []}'}, "must be JSON"),
        ("openvino", {"load_config": '{"CPU": {"INFERENCE_PRECISION_HINT": "bf16"}}'}, "use precision"),
    ],
)
def test_what_would_belie_the_receipt_is_refused(name: str, options: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        providers.find(name, options)


def test_a_numbered_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(providers.ort, "preload_dlls", lambda: sys.stdout.write("no cudnn"), raising=False)
    monkeypatch.setattr(hardware, "Path", lambda path: tmp_path)
    assert providers.find("cuda:1").device == "GPU 1"
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "information").write_text("Model: \t NVIDIA H100\nIRQ: 7\n")
    provider = providers.find("cuda:1")
    assert (provider.device, provider.device_id) == ("NVIDIA H100", 1)
    told = provider.configure(ort.SessionOptions(), precision="fp32", threads=1, fixed=False, extra={})
    assert told[0][1]["device_id"] == "1"
    assert capfd.readouterr().out == ""


def test_a_users_load_config_keeps_our_precision() -> None:
    extra = {"load_config": '{"CPU": {"ENABLE_HYPER_THREADING": "NO"}}'}
    told = Provider(name="openvino", ort_name="X", device="").configure(
        ort.SessionOptions(), precision="fp32", threads=1, fixed=True, extra=extra
    )
    expected = {"ENABLE_HYPER_THREADING": "NO", "INFERENCE_PRECISION_HINT": "f32"}
    assert json.loads(told[0][1]["load_config"]) == {"CPU": expected}


@pytest.mark.parametrize(
    ("machine", "runs"), [("aarch64", "fp16"), ("arm64", "fp16"), ("armv7l", "fp32"), ("AMD64", "fp32")]
)
def test_halves_on_the_cpu(monkeypatch: pytest.MonkeyPatch, machine: str, runs: str) -> None:
    monkeypatch.setattr(providers.platform, "machine", lambda: machine)
    assert Provider(name="cpu", ort_name="", device="").arithmetic("fp16", "auto") == runs


def test_the_doctor_calls_present_only_what_runs(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def text(model: Path) -> str:
        return next(finding.text for finding in doctor.examine(model) if finding.topic == "cpu")

    assert text(bundle).startswith("present: ")
    assert text(tmp_path / "none").startswith("installed, not tried")
    broken = Provider(name="cpu", ort_name="CUDAExecutionProvider", device="")
    for module in (providers, engine_module):
        monkeypatch.setattr(module, "find", lambda name, extra=None: broken)
    assert text(bundle).startswith("cpu is not in this build")
