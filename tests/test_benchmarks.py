"""The scripts in ``benchmarks/``: their command lines, their arithmetic, and what is written of the records."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.bench import Outcome
from deblur_deploy.evaluation.clock import Lap
from deblur_deploy.evaluation.latency import Timing
from deblur_deploy.evaluation.quality import psnr
from deblur_deploy.evaluation.record import Record, Row, new_record, read_record, write_json
from deblur_deploy.runtime.receipt import Receipt
from deblur_deploy.training.checkpoint import load_checkpoint, save_checkpoint
from deblur_deploy.training.unet import PRESETS, UNet, UNetConfig
from deblur_deploy.training.validation import TorchRestorer
from tests import small, tiny
from tests.photos import write_pairs

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "latency": "Latency", "quality": "Quality", "peers": "Peers", "limits": "Limits", "scaling": "Scaling",
    "engine": "Engine", "video": "Video", "quantization": "Quantization", "pruning": "Pruning",
    "report": "Report",
}  # fmt: skip
SIZES = ("640x360", "1280x720")


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_what_it_does_and_refuses_what_makes_no_sense(name, script, monkeypatch, capsys):
    module = script(name)
    for arguments, status, said in ((["--help"], 0, "--quick"), (["--threads", "0"], 2, "allowed: 1 or more")):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            script("common").script(getattr(module, SCRIPTS[name]), module.run)
        assert caught.value.code == status
        printed = capsys.readouterr()
        assert said in printed.out + printed.err


@pytest.mark.parametrize(
    "config", [*PRESETS.values(), UNetConfig(stem=2, encoder=((16,), (8, 24)), up=(8,), decoder=((16,),))]
)
def test_bytes_are_those_that_hooks_on_the_convolutions_count(config, script):
    counted = 0

    def count(module, inputs, output):
        nonlocal counted
        counted += inputs[0].numel() + output.numel()

    net = UNet(config)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(count)
    side = 2 * config.size_divisor
    with torch.no_grad():
        net(torch.zeros(1, 3, side, side))
    assert script("limits").values_per_pixel(config) * side**2 == pytest.approx(counted)


def test_the_share_of_the_ceiling_is_operations_over_rate_and_time(script):
    config = PRESETS["hd"]
    ceilings = {"cpu": {"int8_tops": {"rate": 1.0}, "copy_gb_per_s": {"rate": 1000.0}}}
    share = script("limits").share(row("int8", 100.0, size="1280x720"), config, ceilings)
    operations = 2 * config.macs_per_pixel * 1280 * 720
    assert share["share_of_compute"] == pytest.approx(operations / 1e12 / 0.1)
    assert share["nearest"] == "compute"
    padded = script("limits").share(row("int8", 100.0, size="1279x705"), config, ceilings)
    assert padded["giga_operations"] == share["giga_operations"]


def test_the_ceilings_of_a_gpu_wait_for_the_device_after_each_call(script, monkeypatch):
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    timed: dict[str, object] = {}

    def take_turns(calls, **_):
        for name, call in calls.items():
            before = len(waits)
            call()
            assert len(waits) == before + 1
            timed[name] = Timing.of([Lap(1000.0)])
        return timed

    limits = script("limits")
    monkeypatch.setattr(limits, "take_turns", take_turns)
    found = limits.gpu_ceilings(64, device="cpu", copied=4096)
    assert torch.get_float32_matmul_precision() == "highest"
    for name in ("fp32", "tf32", "fp16", "bf16", "int8"):
        assert found[f"{name}_tops"]["rate"] == pytest.approx(2 * 64**3 / 1e12)
    assert found["copy_gb_per_s"]["rate"] == pytest.approx(2 * 4096 / 1e9)


def test_a_ceiling_is_the_best_of_what_was_tried_and_counts_its_operations(script, monkeypatch):
    def take_turns(calls, **_):
        for call in calls.values():
            call()
        return {name: Timing.of([Lap(1000.0)]) for name in calls}

    limits = script("limits")
    monkeypatch.setattr(limits, "take_turns", take_turns)
    threads = torch.get_num_threads()
    found = limits.cpu_ceilings(256, 1, 1.0)
    assert list(limits.cpu_ceilings(256, 1, 1.0, ("int8",))) == ["int8_tops"]
    torch.set_num_threads(threads)
    assert found["fp32_tops"]["rate"] == pytest.approx(2 * 256**3 / 1e12)
    # In the same second the convolution did more: 256 x 256 values, each multiplied 9 x 512 times.
    assert found["int8_tops"] == {
        "rate": pytest.approx(2 * 256**2 * 9 * 512 / 1e12),
        "library": "onnxruntime, convolution",
    }


@pytest.mark.parametrize("how", [{}, {"channels_last": True}, {"half": "bfloat16"}, {"half": "float16"}])
def test_torch_as_a_peer_restores_what_the_network_does(how, script, tmp_path):
    path = tmp_path / "small.safetensors"
    net = small.unet("stem2")
    save_checkpoint(net, path)
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark
    try:
        candidate = script("peer_torch").load(str(path), 2, **how)
        restored = candidate.restore(image)
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.set_grad_enabled(True)
    assert psnr(restored, TorchRestorer(net)(image)) > (45 if how.get("half") else 70)
    half = how.get("half")
    assert candidate.facts["autocast"] == (half if half == "bfloat16" else None)
    assert candidate.facts["weights"] == ("float16" if half == "float16" else "float32")


@pytest.mark.parametrize("name", ["peer_onnx", "peer_torch", "streams"])
def test_a_candidates_process_holds_nothing_but_the_candidate(name):
    """Its peak memory and its time to load are published."""
    code = f"import sys, {name}; print([name for name in ('cv2', 'skimage') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch about itself
def test_a_provider_that_onnxruntime_replaces_by_the_cpu_is_no_peer(script, tmp_path, monkeypatch):
    save_checkpoint(small.unet("flat"), tmp_path / "small.safetensors")
    script("peer_torch").export(tmp_path / "small.safetensors", tmp_path / "small.onnx", 24, 48)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    files = {"48x24": str(tmp_path / "small.onnx")}
    image = np.zeros((24, 48, 3), np.uint8)
    peer_onnx = script("peer_onnx")
    assert peer_onnx.onnxruntime_defaults(files, 2).restore(image).shape == image.shape
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this machine's onnxruntime has CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(RuntimeError, match="CPUExecutionProvider instead of CUDAExecutionProvider"):
            peer_onnx.onnxruntime_defaults(files, 2, "CUDAExecutionProvider").restore(image)


@pytest.mark.slow
def test_a_preset_is_a_network_to_compare_on(script, tmp_path, monkeypatch):
    peers = script("peers")
    monkeypatch.setitem(peers.PRESETS, "article", small.CONFIGS["flat"])
    network = peers._network("article", peers.Peers(), tmp_path, [], lambda _: None)
    assert {entry.variant for entry in network.ours} == {"fp32", "fp16", "int8", "int8-planes"}
    assert {entry.model for entry in network.ours} == {network.name} == {"article, seeded"}
    assert load_checkpoint(network.checkpoint).head.weight.abs().max() > 0
    assert network.weights == "seeded"
    with pytest.raises(InputError, match="'nothing'; allowed: shipped, article"):
        peers._network("nothing", peers.Peers(), tmp_path, [], lambda _: None)


def test_two_passes_are_compared_row_by_row(script):
    def made(int8: float, fp32: float, reference: float) -> Outcome:
        rows = [row("int8", int8, steady_ms=int8 / 2), row("fp32", fp32), row("fp16", None, error="no")]
        return Outcome(rows=rows, reference_ms={"640x360": reference})

    passes = made(100.0, 50.0, 10.0), made(104.0, 50.0, 10.4)
    disagreement = script("latency").disagreement
    found = disagreement(*passes, "median_ms")
    assert (found["worst"], found["median"]) == (pytest.approx(0.04), pytest.approx(0.02))
    assert "int8" in found["where"]
    # The whole machine was 4 % slower.
    found = disagreement(*passes, "steady_ms", to_reference=True)
    assert found["worst"] == pytest.approx(0)
    assert disagreement(*passes, "p95_ms") == {}


def test_with_one_thread_it_is_seen_whether_the_engines_choice_is_the_fastest(script, bundle):
    latency = script("latency")
    rows = [row("int8", 30.0), row("fp32", 20.0), row("float", 10.0), row("fp16", None, error="no")]
    found = latency.one_thread(latency.Latency(model=bundle), rows)
    assert [line["variant"] for line in found] == ["int8", "fp32", "float", "fp16"]
    # The engine goes by the bundle, and never takes floats for bytes.
    assert [line["variant"] for line in found if line["chosen"]] == ["int8"]
    assert [line["variant"] for line in found if line["fastest"]] == ["fp32"]
    record = msgspec.structs.replace(records()["latency"], found={"one_thread": found})
    assert script("tables").one_thread_table(record).rows == [
        ["int8", "cpu", "30.0", "chosen"], ["fp32", "cpu", "20.0", "fastest"],
        ["float", "cpu", "10.0", ""], ["fp16", "cpu", "failed", ""],
    ]  # fmt: skip
    assert script("tables").one_thread_table(records()["quality"]) is None


def row(variant: str, median_ms: float | None, size: str = "640x360", provider: str = "cpu", **more) -> Row:
    receipt = Receipt(
        model="hd", variant=variant, provider="cpu", device="d", precision="int8", effective_precision="int8",
        threads=2, nodes={"cpu": 1.0}, macs={"cpu": 1.0}, load_ms=1, warm_up_ms=1, versions={},
    )  # fmt: skip
    facts = {"receipt": msgspec.to_builtins(receipt)} if provider == "cpu" else {"library": provider}
    return Row(model="hd", variant=variant, provider=provider, size=size, median_ms=median_ms, facts=facts, **more)


def records() -> dict[str, Record]:
    quality = {"psnr": 28.5, "psnr_blurred": 27.0, "ssim": 0.8}
    latency = [
        row(name, ms * (1 + 3 * k), size)
        for k, size in enumerate(SIZES)
        for name, ms in (("int8", 10.0), ("fp32", 50.0))
    ]
    latency.append(row("broken", None, error="no such file"))
    share = {
        "variant": "int8", "provider": "cpu", "arithmetic": "int8", "ms": 40.0, "giga_operations": 48.0,
        "mega_bytes": 70.0, "tops": 1.2, "share_of_compute": 0.61, "share_of_bandwidth": 0.1, "nearest": "compute",
    }  # fmt: skip
    ratio = {"size": "1280x720", "ratio": 7.04, "int8_ms": 40.0, "eager_fp32_ms": 281.6}
    peers = [row("int8", 40.0, "1280x720", **quality), row("eager fp32", 281.6, "1280x720", "PyTorch", **quality)]
    other = row("eager fp32", 999.0, "1280x720", "PyTorch", **quality)
    peers.append(msgspec.structs.replace(other, model="article, seeded"))
    networks = {"hd": {"macs_per_pixel": 27_000.0}, "article, seeded": {"macs_per_pixel": 210_000.0}}
    one = {"size": "1280x720", "ms": 40.0, "ms_per_megapixel": 43.0, "peak_mb": 200.0}
    scaling = {
        "pixels": [one],
        "threads": [{"threads": 1, **one}],
        "streams": [{"streams": 1, "images_per_s": 25.0, **one}],
        "batch": [{"batch": 2, "ms_per_image": 41.0}],
    }
    pruned = {"heading": "Pruned", "columns": ["removed", "PSNR"], "rows": [["half", "28.41"]], "note": "Recovered."}
    points = [{"label": "half", "group": "pruned", "milliseconds": 20.0, "psnr": 28.41}]
    again = {"second_pass": {"worst": 0.03, "median": 0.01, "where": "int8"}}
    line = {"variant": "int8", "provider": "cpu", "median_ms": 77.0, "error": None, "chosen": True, "fastest": True}
    settings = {"threads": 2, "quick": False, "data": "crops", "pairs": ["a"], "size": "1280x720"}
    settings |= {"variant": "int8", "provider": "cpu"}

    def made(name: str, rows: list[Row], **found) -> Record:
        return new_record(name, settings, rows=rows, found=found, machine_noise=0.012)

    def elsewhere(record: Record) -> Record:
        return msgspec.structs.replace(record, machine={**record.machine, "processor": "Slow"})

    ceilings = {"cpu": {"int8_tops": {"rate": 2.0, "library": "onnxruntime"}}}
    return {
        "latency": made("latency", latency, **again, one_thread=[line]),
        "quality": made(
            "quality",
            [row(name, None, "", **quality, data="built-in") for name in ("int8", "fp32", "broken")]
            + [row("int8", None, "", **(quality | {"psnr": 31.25}), data="street")],
        ),
        "peers": made("peers", peers, int8_cpu_against_eager_fp32=ratio, product_model="hd", networks=networks),
        "pruning": elsewhere(made("pruning", [], tables=[pruned, pruned | {"heading": "More"}], points=points)),
        "engine": made(
            "engine", [], overhead={"engine_over_session": 1.0123, "frames": 12}, trials=[{"tile_px": 512, "ms": 7.125}]
        ),
        "limits": made("limits", [], shares=[share], ceilings=ceilings),
        "scaling": made("scaling", [], **scaling),
    }


@pytest.fixture(scope="module")
def reported(script, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    for name, record in records().items():
        write_json(root / "results" / f"{name}.json", record)
    drawn = "<svg><style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style><g/></svg>"
    (root / "results" / "engine_tiles.svg").write_text(drawn)
    (root / "docs").mkdir()
    for path in (root / "README.md", root / "docs" / "index.md"):
        path.write_text("# before\n\n<!-- table:begin -->\nold\n<!-- table:end -->\n\nafter\n")
    tiny.write_bundle(root / "bundle")
    assert script("report").run(options(script, root)) == 0
    return root


@pytest.fixture
def checkout(reported, tmp_path):
    return shutil.copytree(reported, tmp_path / "checkout")


def options(script, checkout: Path, **more):
    places = {name: checkout / name for name in ("results", "docs")}
    places |= {"readme": checkout / "README.md", "out": checkout / "results", "model": checkout / "bundle"}
    return script("report").Report(**places, **more)


def test_readme_pages_and_figures_are_made_from_the_records(checkout, script):
    report = script("report")
    readme, index, main = (checkout / name for name in ("README.md", "docs/index.md", "docs/main.md"))
    for path in (readme, index):
        assert path.read_text().startswith("# before\n\n<!-- table:begin -->")
        assert path.read_text().endswith("<!-- table:end -->\n\nafter\n")
        assert "old" not in path.read_text()
    size = f"{(checkout / 'bundle' / 'int8.onnx').stat().st_size / 1e6:.1f}"
    for text in (
        f"| int8 | CPUs; what runs by default | {size} | cpu, int8 | 40.0 | 27.00 → 28.50 |",
        "| broken |  |  | failed |  |  |",
        "+1.50 dB (built-in), +4.25 dB (street)",
        "int8 loses at most 0.000 dB in the mean",
        "**7.0 times** faster ([other tools",
    ):
        assert text in readme.read_text()
    assert "(main.md) | 40.0 (int8, cpu) | 282 (eager fp32, PyTorch) | 282 |" in index.read_text()
    page, html = main.read_text(), (checkout / "results" / "report.html").read_text()
    assert "| int8 | cpu, int8 | 10.0 | 40.0 | 25.0 |" in page
    assert "| broken | cpu: failed | failed | failed |" in page
    assert "## One thread\n\n| variant | provider | 1280x720, ms |" in page
    assert "| int8 | cpu | 77.0 | chosen, fastest |" in page
    for text in ("28.50 | +1.50 | 0.8000", "61%", "**7.0 times** faster", "differed by 1.0% (median) and 3.0% (most)"):
        assert text in page
    assert html.count("<svg") == 5
    assert "Engine: tiles" in html
    assert "svg{color" not in html
    for text in ("31.250", "article, seeded (210 kMAC a pixel)", "999", "1.012", "More", "28.41", "tile px", "7.125"):
        assert text in page
        assert text in html
    assert "## Pruned\n\n| removed | PSNR |\n|---|---:|\n| half | 28.41 |\n\nRecovered. Measured on Slow (" in page
    assert "pruning: Measured on Slow" in page
    assert html.count("data:image/jpeg;base64,") == 2 * 6
    for name in ("pareto", "latency", "shares"):
        assert f"](main-{name}.svg)" in page
        assert report.digest(records_of(checkout)) in (checkout / "docs" / f"main-{name}.svg").read_text()
    assert report.run(options(script, checkout, check=True)) == 0


def records_of(checkout: Path) -> dict[str, Record]:
    return {name: read_record(checkout / "results" / f"{name}.json") for name in records()}


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: edit(root / "README.md", "| 40.0 |", "| 39.9 |"),
        lambda root: edit(root / "README.md", "7.0 times", "8.0 times"),
        lambda root: edit(root / "docs" / "main.md", "| 40.0 |", "| 39.9 |"),
        lambda root: edit(root / "docs" / "index.md", "| 282 |", "| 283 |"),
        lambda root: edit(root / "results" / "latency.json", '"median_ms": 40.0', '"median_ms": 41.0'),
        lambda root: edit(root / "results" / "quality.json", '"psnr": 28.5', '"psnr": 28.6'),
        lambda root: (root / "docs" / "main-pareto.svg").unlink(),
        lambda root: (root / "docs" / "main.md").unlink(),
        lambda root: (root / "docs" / "gone.md").touch(),
        lambda root: (root / "docs" / "gone-latency.svg").touch(),
        lambda root: (root / "results" / "peers.json").unlink(),
        lambda root: (root / "results" / "report.html").unlink(),
        lambda root: edit(root / "results" / "engine.json", "1.0123", "1.0124"),
    ],
)
def test_whatever_disagrees_with_the_records_is_found(damage, checkout, script, capsys):
    report = script("report")
    damage(checkout)
    assert report.run(options(script, checkout, check=True)) == 1
    assert "run benchmarks/report.py" in capsys.readouterr().err.replace("\n", " ")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_nothing_is_claimed_from_quick_runs_or_without_markers(checkout, script):
    report = script("report")
    edit(checkout / "results" / "peers.json", '"quick": false', '"quick": true')
    with pytest.raises(InputError, match=r"peers.json was measured with --quick"):
        report.run(options(script, checkout))
    edit(checkout / "results" / "limits.json", '"threads": 2', '"files": {"int8": "another"}, "threads": 2')
    with pytest.raises(InputError, match=r"limits.json is of other files than latency.json"):
        report.read_machines(checkout / "results", quick=True)
    write_json(checkout / "results" / "limits.json", records()["limits"])
    (checkout / "README.md").write_text("# no markers\n")
    with pytest.raises(InputError, match="table:begin"):
        report.run(options(script, checkout, quick=True))
    with pytest.raises(InputError, match=r"holds no latency.json"):
        report.read_machines(checkout / "bundle")


def test_times_of_earlier_weights_are_said_to_be_that(checkout, script):
    report, said = script("report"), "an earlier export: the same network, other weights"
    assert report.run(options(script, checkout)) == 0
    assert said not in (checkout / "README.md").read_text() + (checkout / "docs" / "main.md").read_text()
    edit(checkout / "results" / "latency.json", '"threads": 2', '"files": {"int8": "earlier"}, "threads": 2')
    assert report.run(options(script, checkout)) == 0
    assert said in (checkout / "README.md").read_text()
    assert said in (checkout / "docs" / "main.md").read_text()


def test_what_is_committed_agrees_with_the_committed_records(script):
    report = script("report")
    assert report.stale(report.Report(), report.read_machines(report.RESULTS)) == []


def test_another_machine_has_a_page_of_its_own_and_a_line_in_the_index(checkout, script):
    report, other = script("report"), records()
    for name in ("latency", "peers"):
        machine = {"processor": "Elsewhere", "instructions": ["neon"]}
        write_json(checkout / "results" / "arm" / f"{name}.json", msgspec.structs.replace(other[name], machine=machine))
    assert report.run(options(script, checkout, check=True)) == 1
    assert report.run(options(script, checkout)) == 0
    readme, index, page = ((checkout / name).read_text() for name in ("README.md", "docs/index.md", "docs/arm.md"))
    assert "Elsewhere" not in readme
    assert "[Elsewhere (neon)](arm.md) | 40.0 (int8, cpu)" in index
    assert page.startswith("# Elsewhere (neon)\n")
    assert "](arm-pareto.svg)" in page
    assert (checkout / "docs" / "arm-pareto.svg").is_file()
    assert "The shipped variants on Elsewhere (neon)" in (checkout / "results" / "report.html").read_text()
    assert report.run(options(script, checkout, check=True)) == 0
    shutil.rmtree(checkout / "results" / "arm")
    gone = options(script, checkout)
    named = {path.name for path in report.leftovers(gone, report.read_machines(gone.results))}
    assert named == {"arm.md", "arm-pareto.svg", "arm-latency.svg"}


@pytest.mark.parametrize(
    ("earlier", "said"),
    [
        (["old"], "Fast. Of an earlier export: the same network, other weights."),
        (["old", "main"], "Fast."),
        ([], "Fast."),
    ],
)
def test_a_table_says_if_it_alone_is_of_an_earlier_export(script, monkeypatch, earlier, said):
    pages = script("pages")
    monkeypatch.setattr(pages, "is_earlier", lambda record: record.benchmark in earlier)
    table = pages.Table(heading="int8", columns=[], rows=[], note="Fast.")
    note = pages._placed(table, new_record("old", {}), new_record("main", {})).note
    assert note == said


def test_quality_needs_no_data_and_measures_what_was_chosen(script, bundle, tmp_path):
    quality = script("quality")
    chosen = {"providers": ("cpu",), "variants": ("fp32", "int8")}
    assert quality.run(quality.Quality(model=bundle, out=tmp_path, quick=True, **chosen)) == 0
    record = read_record(tmp_path / "quality.json")
    assert [row.variant for row in record.rows] == ["fp32", "int8"]
    assert record.settings["providers"] == ["cpu"]


def test_limits_take_the_latencies_of_a_record_of_the_same_files(script, bundle, tmp_path, monkeypatch):
    limits = script("limits")
    monkeypatch.setattr(limits, "measure_latency", lambda *_: pytest.fail("measured"))
    options = limits.Limits(model=bundle, rows=tmp_path / "latency.json")
    of_these = new_record("latency", options.settings(), rows=[row("int8", 10.0)])
    write_json(tmp_path / "latency.json", of_these)
    assert limits._timed(options, None, [], None).rows[0].median_ms == 10
    write_json(tmp_path / "latency.json", msgspec.structs.replace(of_these, settings={"files": {"int8": "another"}}))
    with pytest.raises(InputError, match=r"latency.json is of other files than .*; measure again"):
        limits._timed(options, None, [], None)


@pytest.mark.parametrize("size", ["720p", "1280", "0x5", "1280x720x3"])
def test_sizes_that_are_none_are_refused(script, bundle, size):
    with pytest.raises(ValueError, match=f"sizes has '{size}'; allowed: WIDTHxHEIGHT"):
        script("peers").Peers(model=bundle, sizes=(size,))


@pytest.mark.slow
def test_quality_measures_a_real_bundle_on_every_set(checkout, script, tmp_path):
    quality = script("quality")
    write_pairs(tmp_path / "mine", 3)
    (tmp_path / "mine" / "blur" / "1.png").write_bytes(b"no image")
    status = quality.run(
        quality.Quality(model=checkout / "bundle", out=checkout, quick=True, data=(tmp_path / "mine",))
    )
    assert status == 1
    record = read_record(checkout / "quality.json")
    assert ["1.png" in note for note in record.notes].count(True) == 1
    rows = [row for row in record.rows if row.provider == "cpu"]
    for data in ("built-in photographs", "mine"):
        assert {row.variant for row in rows if row.data == data} == {"fp32", "fp16", "int8", "float"}
    assert all(row.psnr > 5 for row in rows)
    assert record.settings["sets"] == {"built-in photographs": 3, "mine": 2}


def test_the_table_of_int8_says_what_each_loses_where(script):
    lost = {
        f"hd/{name}": {"drop_db": drop, "worst_drop_db": 2 * drop}
        for name, drop in (("int8 on cpu", 0.0104), ("theirs on tool", 1.0))
    }
    made = msgspec.structs.replace(
        records()["latency"],
        rows=[row("theirs", 80.0, provider="tool"), row("int8", 40.0)],
        settings={"crop_px": 320},
        found={"quality": {"hd": {"built-in": lost, "other": {}}}},
    )
    table = script("tables").int8_table(made)
    assert table.columns[-2:] == ["built-in", "other"]
    assert [[line[1], *line[3:]] for line in table.rows] == [
        ["int8", "40.0", "0.010 (0.02)", ""],
        ["theirs", "80.0", "1.000 (2.00)", ""],
    ]
