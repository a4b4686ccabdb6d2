"""A network of somebody else is pruned, exported and run; what is wrong with it is one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deblur_deploy import DeblurEngine
from deblur_deploy.cli.export import command
from deblur_deploy.errors import InputError, OutputError, TrainingError
from deblur_deploy.pipeline.pruning import stranger
from deblur_deploy.pipeline.pruning.config import PruneConfig, RecoverConfig
from deblur_deploy.pipeline.pruning.finetune import finetune
from deblur_deploy.pipeline.pruning.stranger import load_module, reach
from tests.photos import photo

TINY = ["--prune.recover.workers", "0", "--prune.recover.steps", "0"]
SHORT = RecoverConfig(steps=30, patches=2, side_px=48, workers=0, precision="fp32", learning_rate=1e-3)


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


@pytest.mark.slow
def test_it_is_pruned_exported_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(scaled().state_dict(), tmp_path / "own.safetensors")
    out = tmp_path / "out"
    words = [str(tmp_path / "own.safetensors"), "--out", str(out), "--model", "tests.test_stranger:scaled"]
    words += ["--prune.recover.workers", "0", "--prune.recover.steps", "9", "--prune.recover.patches", "1"]
    assert command([*words, "--divisor", "2", "--prune.macs", "0.6", "--prune.recover.side-px", "33"]) == 0
    printed = capsys.readouterr().err
    for said in (
        "up is left as it is: ",
        "fp32 at 1280x720 on cpu, ms: ",
        "note: recovered on five built-in photographs",
    ):
        assert said in printed
    record = json.loads((out / "pruning.json").read_text())
    assert list(record["psnr"]) == ["dense", "pruned", "recovered"]
    assert record["psnr"]["recovered"] != record["psnr"]["pruned"]
    assert record["macs_per_pixel"][1] <= 0.6 * record["macs_per_pixel"][0]
    program = torch.export.load(out / "module.pt2").module()
    assert sum(p.numel() for p in program.parameters()) == record["parameters"][1] < record["parameters"][0]
    assert record["parameters"][0] == sum(p.numel() for p in scaled().parameters())
    image = photo(3, 45, 67)
    with torch.no_grad():
        padded = np.pad(image, ((0, 1), (0, 1), (0, 0)), mode="edge")
        expected = program(torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255).clamp(0, 1) * 255
    with DeblurEngine(out / "fp32.onnx", provider="cpu") as engine:
        difference = engine(image) - expected[0].permute(1, 2, 0)[:45, :67].numpy()
    assert np.abs(difference).max() <= 0.51


@pytest.mark.slow
@pytest.mark.parametrize("target", [30, 1])
def test_it_is_fitted_to_a_latency(target: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def slow_machine(files: list[Path], config: PruneConfig, _: object) -> list[SimpleNamespace]:
        asked.append(config.size())
        # A millisecond for 200 bytes of weights: the middle layer has 9.2 kB.
        sizes = [sum(len(value.raw_data) for value in onnx.load(path).graph.initializer) for path in files]
        return [SimpleNamespace(median_ms=size / 200) for size in sizes]

    monkeypatch.setattr(stranger, "time_files", slow_machine)
    words = ["--out", str(tmp_path / "out"), "--model", "tests.test_stranger:build", "--divisor", "2", "--at", "64x32"]
    words += ["--prune.target-ms", str(target), "--prune.multiple", "1", "--prune.importance", "magnitude", *TINY]
    if target == 1:
        with pytest.raises(InputError, match=r"target_ms is 1, but the smallest network, .* takes \d"):
            command(words)
        return
    assert command(words) == 0
    latency = json.loads((tmp_path / "out" / "pruning.json").read_text())["latency"]
    assert 27 <= latency["ms"] <= 30 < latency["dense_ms"]
    assert set(asked) == {(64, 32)}


def test_an_output_that_exists_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stranger, "Channels", None)
    (tmp_path / "file").write_text("kept")
    words = ["--model", "tests.test_stranger:build", "--divisor", "2", "--prune.macs", "0.5"]
    with pytest.raises(OutputError, match="is not empty"):
        command(["--out", str(tmp_path), *words])


@pytest.mark.slow
def test_a_recovery_that_made_it_worse_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(net: nn.Module, *_: object) -> nn.Module:
        return nn.Sequential(copy.deepcopy(net), nn.Hardtanh(0, 0.1))

    monkeypatch.setattr(stranger, "finetune", worse)
    config = PruneConfig(macs=0.6, importance="magnitude", at="4x4", provider="nowhere", recover=SHORT)
    record = stranger.prune_stranger(build(), config, tmp_path / "out", divisor=2, force=False)
    assert record["psnr"]["recovered"] < record["psnr"]["pruned"]
    assert record["latency"] is None
    assert [note.split(":")[0] for note in record["notes"] if "weak" not in note] == [
        "not timed",
        "recovery only made it worse; what is written is the pruned network as it was before",
    ]
    program = torch.export.load(tmp_path / "out" / "module.pt2").module()
    assert float(program(torch.ones(2, 3, 64, 64)).detach().max()) > 0.5


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


def test_reach_is_that_of_the_kernels() -> None:
    assert reach(nn.Conv2d(3, 3, 7, padding=3), 1) == 3
    assert 4 <= reach(build(), 2) <= 7
    assert reach(nn.Sequential(nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3)), 1) == 1 << 20


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nowhere.at.all:build"], "cannot import nowhere.at.all"),
        (["--model", "tests.test_stranger"], "allowed: package.module:build"),
        (["--model", "tests.test_stranger:absent"], "no attribute 'absent'"),
        (["--model", "tests.test_stranger:no_network"], "gave str; a torch.nn.Module is needed"),
        (["--model", "tests.test_stranger:broken"], "fails in layer 1: "),
        (["--model", "tests.test_stranger:odd"], "fails in the network's own forward: 'b'"),
        (["--model", "tests.test_stranger:unlucky"], "ValueError: no luck"),
        (["--model", "tests.test_stranger:build", "--divisor", "3"], "--divisor is 3; allowed: 1, 2, 4"),
        (["--model", "tests.test_stranger:build", "--prune.rounds", "2"], "rounds is 2; allowed for a network of your"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        command(["--out", str(tmp_path / "out"), *words, "--prune.macs", "0.5", *TINY])
    assert not (tmp_path / "out").exists()


def test_weights_of_another_network_are_named(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"does not hold the weights of tests\.test_stranger:build"):
        load_module("tests.test_stranger:build", tmp_path / "other.safetensors")
