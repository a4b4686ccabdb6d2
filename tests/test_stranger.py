"""A network of somebody else comes in as a module, is pruned if asked, and becomes a bundle; mistakes are one line."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deblur_deploy import DeblurEngine
from deblur_deploy.cli.common import guarded
from deblur_deploy.cli.export import command
from deblur_deploy.errors import InputError, OutputError, TrainingError
from deblur_deploy.media.images import write_image
from deblur_deploy.pipeline import inputs
from deblur_deploy.pipeline.build import Build
from deblur_deploy.pipeline.config import NetworkConfig
from deblur_deploy.pipeline.convention import Convention
from deblur_deploy.pipeline.doors.module import ModuleRunner, Standard, load_module
from deblur_deploy.pipeline.doors.source import Source, of_module, open_door
from deblur_deploy.pipeline.pruning import module
from deblur_deploy.pipeline.pruning.config import PruneConfig, RecoverConfig
from deblur_deploy.pipeline.pruning.finetune import finetune
from deblur_deploy.pipeline.pruning.limit import time_limit
from deblur_deploy.pipeline.pruning.shrink import Smaller
from deblur_deploy.pipeline.recipe import Recipe
from tests import strangers
from tests.photos import photo
from tests.small import unet

TINY = ["--prune.recover.workers", "0", "--prune.recover.steps", "0"]
SHORT = RecoverConfig(steps=30, patches=2, side_px=48, workers=0, precision="fp32", learning_rate=1e-3)
PAIRS = inputs.pairs(None)


class Own(nn.Module):
    """Halves the image and restores its size, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 16, 4, stride=2, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 3, 2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        return image + 0.1 * self.up(torch.relu(self.middle(torch.relu(self.down(image)))))


def build() -> nn.Module:
    torch.manual_seed(0)
    return Own()


def broken() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(7, 3, 3, padding=1))


class Odd(nn.Module):
    """Fails in its own way."""

    def forward(self, image: Tensor) -> Tensor:
        return image + {"a": 1}["b"]


def odd() -> nn.Module:
    return Odd()


def unlucky() -> nn.Module:
    raise ValueError("no luck")


class Scaled(Own):
    """Has a parameter that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.scale * super().forward(image)


def scaled() -> nn.Module:
    torch.manual_seed(0)
    return Scaled()


def no_network() -> str:
    return "network"


def attention() -> nn.Module:
    return strangers.seeded(strangers.Attention)


def windows() -> nn.Module:
    print("loading...")  # noqa: T201
    return strangers.seeded(strangers.Windows)


def many() -> nn.Module:
    return strangers.seeded(strangers.Many)


def ours() -> nn.Module:
    return unet("classic")


class Only(strangers.Residual):
    """Of one size."""

    def forward(self, image: Tensor) -> Tensor:
        assert image.shape[2:] == (256, 256), "only 256x256"
        return super().forward(image)


def only() -> nn.Module:
    return Only()


class OnGpu(strangers.Residual):
    """Of one machine."""

    def forward(self, image: Tensor) -> Tensor:
        if not torch.cuda.is_available():
            raise RuntimeError("Torch not compiled\n with CUDA enabled")
        return super().forward(image)


def on_gpu() -> nn.Module:
    return OnGpu()


def leaves() -> nn.Module:
    sys.exit("no gpu")


class Needy(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()


def mistyped() -> nn.Module:
    return nn.Conv2d(3, "3" + 0, 1)  # type: ignore[operator]


def twice() -> nn.Module:
    return nn.Upsample(scale_factor=2)


def gray() -> nn.Module:
    return nn.Conv2d(1, 1, 3, padding=1)


class TwoInputs(strangers.Residual):
    """Wants to know how noisy the image is."""

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(image) + noise


def two() -> nn.Module:
    return TwoInputs()


def broken_weights() -> nn.Module:
    net = strangers.Residual()
    with torch.no_grad():
        net.first.weight[0] = float("nan")
    return net


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Nobody's cache but this module's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEBLUR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and photographs to calibrate on: few and small."""
    folder = tmp_path_factory.mktemp("stranger")
    for seed in range(2):
        for kind in ("blur", "calibration"):
            write_image(folder / kind / f"{seed}.png", cv2.GaussianBlur(photo(seed, 96, 96), (0, 0), 1.2))
        write_image(folder / "sharp" / f"{seed}.png", photo(seed, 96, 96))
    return folder


def words(room: Path, *more: str) -> list[str]:
    quick = ["--verify.providers", "cpu", "--verify.rounds", "1", "--verify.random-sizes", "2", "--int8.tiles", "2"]
    quick += ["--int8.tile-px", "64", "--verify.width-px", "64", "--verify.height-px", "48"]
    quick += [
        "--int8.max-drop-db",
        "3",
        "--int8.max-image-drop-db",
        "3",
        "--int8.sensitivity-crops",
        "1",
        "--int8.min-macs",
        "0.2",
    ]
    return ["--pairs", str(room), "--calibration", str(room / "calibration"), *quick, *more]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "windows"])
def test_it_becomes_a_bundle_like_any_other(
    name: str, room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether int8 pays on this machine is not what is asked here.
    monkeypatch.setattr("deblur_deploy.pipeline.bundle._Choosing._worth_it", lambda _, results: results)
    out, spec = tmp_path / "out", f"tests.test_stranger:{name}"
    assert command([*words(room, "--out", str(out), "--model", spec), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    manifest = json.loads((out / "bundle.json").read_text())
    assert rows == manifest["variants"]
    assert manifest["left_out"] == {}
    assert {row["name"] for row in rows} >= {"fp32", "fp16", "float", "int8"}
    assert manifest["int8"]["chosen"]["macs"] > 0.2
    assert manifest["differing_from_source"] <= 1e-3
    assert manifest["body"]["sees_everything"] == (name == "attention")
    assert {"README.md", "report.html", "recipe.toml"} < {path.name for path in out.iterdir()}
    net, image = globals()[name](), photo(3, 45, 67)
    divisor = manifest["body"]["size_divisor"]
    padded = np.pad(image, ((0, -45 % divisor), (0, -67 % divisor), (0, 0)), mode="edge")
    with torch.no_grad():
        expected = net(torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255).clamp(0, 1) * 255
    for precision, most in (("fp32", 0.51), ("fp16", 1.6), ("int8", 30)):
        with DeblurEngine(out, provider="cpu", precision=precision) as engine:
            difference = engine(image) - expected[0].permute(1, 2, 0)[:45, :67].numpy()
            assert np.abs(difference).max() <= most
    again = tmp_path / "again"
    assert command(["--out", str(again), "--recipe-file", str(out / "recipe.toml")]) == 0
    done = json.loads((again / "bundle.json").read_text())["stages"]
    assert all(stage["cached"] for stage in done)


@pytest.mark.slow
def test_it_is_pruned_and_goes_the_same_way(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(scaled().state_dict(), tmp_path / "own.safetensors")
    out = tmp_path / "out"
    said = [str(tmp_path / "own.safetensors"), "--out", str(out), "--model", "tests.test_stranger:scaled"]
    said += ["--prune.recover.workers", "0", "--prune.recover.steps", "9", "--prune.recover.patches", "1"]
    said += ["--prune.macs", "0.6", "--prune.recover.side-px", "33", "--at", "64x48"]
    assert command([*said, *words(room)]) == 0
    printed = capsys.readouterr().err
    for line in ("up is left as it is: ", "timed at 64x48, ms: ", "note: recovered on five built-in photographs"):
        assert line in printed
    pruning = json.loads((out / "bundle.json").read_text())["pruning"]
    assert list(pruning["psnr"]) == ["dense", "pruned", "recovered"]
    assert pruning["psnr"]["recovered"] != pruning["psnr"]["pruned"]
    assert pruning["macs_per_pixel"][1] <= 0.6 * pruning["macs_per_pixel"][0]
    program = torch.export.load(out / "module.pt2").module()
    assert sum(p.numel() for p in program.parameters()) == pruning["parameters"][1] < pruning["parameters"][0]
    image = photo(3, 45, 67)
    with torch.no_grad():
        padded = np.pad(image, ((0, 1), (0, 1), (0, 0)), mode="edge")
        expected = program(torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255).clamp(0, 1) * 255
    with DeblurEngine(out / "fp32.onnx", provider="cpu") as engine:
        assert engine.contract.size_divisor == 2
        difference = engine(image) - expected[0].permute(1, 2, 0)[:45, :67].numpy()
    assert np.abs(difference).max() <= 0.51
    assert "Pruning" in (out / "report.html").read_text()


def source(net: nn.Module, **how: Any) -> Source:
    known = Convention(output="output", divisor=2, least_px=2, **how)
    return of_module(net, "own", "own", NetworkConfig(), (), known=known)


@pytest.mark.parametrize("target", [30, 1])
def test_it_is_fitted_to_a_latency(target: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def slow_machine(makes: list[Callable[[Path], Path]], config: PruneConfig, _: object) -> list[SimpleNamespace]:
        asked.append(config.size())
        return [SimpleNamespace(median_ms=float(make(tmp_path).read_text()) / 50) for make in makes]

    def file(net: nn.Module, _: Convention, folder: Path) -> Path:
        (folder / "size").write_text(str(sum(value.numel() for value in net.parameters())))
        return folder / "size"

    monkeypatch.setattr(module, "time_files", slow_machine)
    monkeypatch.setattr(module, "fp32_file", file)
    recover = RecoverConfig(steps=0, workers=0)
    config = PruneConfig(target_ms=target, multiple=1, importance="magnitude", at="64x32", recover=recover)
    if target == 1:
        with pytest.raises(InputError, match=r"target_ms is 1, but the smallest network, .* takes \d"):
            module.prune_module(source(build()), config, NetworkConfig(), PAIRS, tmp_path)
        return
    latency = module.prune_module(source(build()), config, NetworkConfig(), PAIRS, tmp_path).record["latency"]
    assert 27 <= latency["ms"] <= 30 < latency["dense_ms"]
    assert set(asked) == {(64, 32)}


def test_an_output_that_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match="is not empty"):
        command(["--out", str(tmp_path), "--model", "nowhere:build", "--prune.macs", "0.5"])


class Every48(nn.Module):
    """A network that takes multiples of 48 only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-1] % 48 or image.shape[-2] % 48:
            raise ValueError("multiples of 48 only")
        return image + self.last(torch.relu(self.first(image)))


def test_a_network_is_scored_at_a_size_that_it_takes() -> None:
    how = Convention(output="output", divisor=48, least_px=48)
    config = PruneConfig(macs=0.6, recover=SHORT)
    job = module._Job(Every48(), how, config, PAIRS.images, lambda _: None)
    assert job.plan.widths(0.6) == {"first": 8}


def test_a_recovery_that_made_it_worse_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(net: nn.Module, *_: object) -> nn.Module:
        return nn.Sequential(copy.deepcopy(net), nn.Hardtanh(0, 0.1))

    monkeypatch.setattr(module, "finetune", worse)
    config = PruneConfig(macs=0.6, importance="magnitude", at="4x4", provider="nowhere", recover=SHORT)
    found = module.prune_module(source(build()), config, NetworkConfig(), PAIRS, tmp_path)
    assert found.record["psnr"]["recovered"] < found.record["psnr"]["pruned"]
    assert found.record["latency"] is None
    assert [note.split(":")[0] for note in found.record["notes"] if "weak" not in note] == [
        "not timed",
        "recovery only made it worse; what is written is the pruned network as it was before",
    ]
    program = torch.export.load(tmp_path / "module.pt2").module()
    assert float(program(torch.ones(1, 3, 64, 64)).detach().max()) > 0.5


def test_what_cannot_be_pruned_stays_as_it_is_unless_a_share_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(*_: object, **__: object) -> None:
        net.middle.weight.detach()  # type: ignore[union-attr, operator]
        layer = net.middle  # noqa: F841
        while True:
            time.sleep(0.01)

    net, said = build(), list[str]()
    monkeypatch.setattr(module, "Channels", endless)
    monkeypatch.setattr(module, "_TRACING_S", 0.2)
    one = source(net)

    def pruned(**target: Any) -> Smaller:
        return module.prune_module(one, PruneConfig(**target), NetworkConfig(), PAIRS, tmp_path, said.append)

    assert pruned(macs=1.0).source is one
    assert pruned(target_ms=9.0).source is one
    assert "note: not pruned: torch-pruning does not come to an end, for more than 0.2 s (layer middle)" in said[-1]
    with pytest.raises(InputError, match=r"does not come to an end"):
        pruned(macs=0.5)


def test_a_time_limit_leaves_what_is_in_time_alone() -> None:
    with time_limit(5, build(), "it takes long"):
        pass
    with pytest.raises(ZeroDivisionError), time_limit(5, build(), "it takes long"):
        _ = 1 / 0


def test_a_module_of_another_convention_is_pruned_in_ours() -> None:
    how = Convention(layout="nhwc", range="255", colour="bgr", output="output")

    class Theirs(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image * torch.tensor([1.0, 0.5, 0.25])

    image = torch.rand(1, 3, 4, 5)
    expected = how.from_raw(ModuleRunner(Theirs())(how.to_raw(image.numpy()))["output"])
    np.testing.assert_allclose(Standard(Theirs(), how)(image).numpy(), expected, atol=1e-6)


def test_one_of_our_own_goes_the_way_of_its_checkpoint(tmp_path: Path) -> None:
    one = open_door(None, NetworkConfig(model="tests.test_stranger:ours"), PAIRS, tmp_path)
    assert (one.runner, one.path) == (None, tmp_path / "ours.safetensors")


@pytest.mark.parametrize("output", ["", "full.1", "small"])
def test_an_output_is_called_by_its_place(output: str, tmp_path: Path) -> None:
    wish = NetworkConfig(model="tests.test_stranger:many", output=output)
    if output == "small":
        with pytest.raises(InputError, match=r"no output 'small' of the image's size; it has: full\.0, full\.1"):
            open_door(None, wish, PAIRS, tmp_path)
        return
    one = open_door(None, wish, PAIRS, tmp_path)
    assert one.convention is not None
    assert one.convention.output == (output or "full.0")


@pytest.mark.parametrize(("steps", "minutes"), [(30, None), (30, 0.02), (0, 0.02)])
def test_recovery_comes_nearer_to_the_whole_network_and_keeps_its_statistics(
    steps: int, minutes: float | None, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    teacher = nn.Sequential(build(), nn.BatchNorm2d(3))
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student[0].up.bias += 1  # type: ignore[index, union-attr, operator]
    kept, seen = copy.deepcopy(student.state_dict()), list[int]()
    config = msgspec.structs.replace(SHORT, steps=steps, minutes=minutes, teacher=9.0)
    found = finetune(student, teacher, config, 2, tmp_path, lambda step, _: seen.append(step))
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        off = [float((net.eval()(image) - teacher.eval()(image)).abs().mean()) for net in (student, found)]
    assert off[1] < (0.9 if minutes is None else 1) * off[0]
    assert minutes or seen == list(range(1, 31))
    for name, value in found.state_dict().items():
        assert torch.equal(student.state_dict()[name], kept[name])
        assert "running" not in name or torch.equal(value, kept[name])


def test_a_loss_that_is_not_finite_ends_recovery(tmp_path: Path) -> None:
    broken = build()
    with torch.no_grad():
        broken.up.weight[:] = float("nan")  # type: ignore[union-attr, index, operator]
    with pytest.raises(TrainingError, match=r"loss is nan at step 0; lower --prune\.recover\.learning-rate"):
        finetune(broken, build(), SHORT, 2, tmp_path)


def test_a_network_that_takes_no_such_patch_ends_recovery(tmp_path: Path) -> None:
    config = msgspec.structs.replace(SHORT, side_px=24)
    with pytest.raises(TrainingError, match=r"fails on 24x24 patches in fp32: .*; choose another --prune\.recover"):
        finetune(nn.Sequential(build(), nn.ReflectionPad2d(30)), build(), config, 2, tmp_path)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere.at.all:build", "cannot import nowhere.at.all"),
        ("tests.test_stranger", "allowed: package.module:build"),
        ("tests.test_stranger:absent", "no attribute 'absent'"),
        ("tests.test_stranger:no_network", "gave str; a torch.nn.Module is needed"),
        ("tests.test_stranger:unlucky", "ValueError: no luck"),
        ("tests.test_stranger:Needy", "Needy must work without arguments .* 'width'"),
        ("tests.test_stranger:mistyped", "TypeError: can only concatenate"),
        ("tests.test_stranger:leaves", "SystemExit: no gpu"),
        ("tests.test_stranger:broken", "does not run on an RGB image of any size that was tried: .* 7 channels"),
        ("tests.test_stranger:odd", "does not run on an RGB image of any size that was tried: 'b'"),
        ("tests.test_stranger:only", "works on 256x256 only, .*: only 256x256"),
        ("tests.test_stranger:on_gpu", "CUDA enabled; build it on the CPU: an export needs no GPU"),
        ("tests.test_stranger:two", "missing 1 required positional argument: 'noise'"),
        ("tests.test_stranger:gray", "to have 1 channels, but got 3 channels instead"),
        ("tests.test_stranger:twice", "makes images 2 times as large"),
        ("tests.test_stranger:broken_weights", r"weights that are NaN \(first.weight\)"),
        ("tests.test_stranger:Own --divisor 3", r"does not take all multiples of 3 \(--divisor\)"),
        ("tests.test_stranger:Own --divisor 0", "divisor is 0; allowed: 1 to 512"),
        ("tests.test_stranger:Own --prune.macs 0.5 --prune.rounds 2", "rounds is 2; allowed for a network of your own"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    spec: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--out", str(tmp_path / "out"), "--model", *spec.split(), "--json"]
    assert guarded("deblur-export", lambda _: command(argv))() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().splitlines()[-1].startswith("deblur-export: ")
    with pytest.raises(InputError, match=said):
        command(argv)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_network_are_named(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"does not hold the weights of tests\.test_stranger:build"):
        load_module("tests.test_stranger:build", tmp_path / "other.safetensors")


def test_a_module_may_change_where_modules_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    text = "import sys, torch\nsys.path.insert(0, '/theirs')\nbuild = lambda: torch.nn.Conv2d(3, 3, 1)\n"
    (tmp_path / "searching.py").write_text(text)
    load_module("searching:build")
    assert sys.path == ["/theirs", *before]


def test_how_images_are_taken_is_found_out_again_on_other_pairs() -> None:
    def inputs_of(pairs: str, runner: Any) -> Any:
        source = Source(name="net", parent="hash", path=None, prepare=lambda: None, runner=runner)  # type: ignore[arg-type, return-value]
        stages = SimpleNamespace(run=lambda *_, inputs, **__: inputs)
        photos = inputs.Photos(pairs, list)
        return Build(stages=stages, source=source, recipe=Recipe(), pairs=photos, calibration=photos).export()  # type: ignore[arg-type]

    assert inputs_of("mine", dict) != inputs_of("yours", dict)
    assert inputs_of("mine", None) == inputs_of("yours", None)
