"""Pruning takes out what it says, counts what is left, and leaves alone what it must."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deblur_deploy.errors import InputError, VerificationError
from deblur_deploy.pipeline.pruning.channels import Channels
from deblur_deploy.pipeline.pruning.config import Importance, PruneConfig
from deblur_deploy.pipeline.pruning.importance import allowed_widths, score
from deblur_deploy.pipeline.pruning.prune import Plan, as_unet, network_of, plan_for, sensitivity, sizes, unet_channels
from deblur_deploy.training.checkpoint import save_checkpoint
from deblur_deploy.training.unet import PRESETS, UNet, UNetConfig, parameter_count
from tests.photos import photo
from tests.small import unet

METHODS: tuple[Importance, ...] = ("magnitude", "taylor", "activation")
ROOT = Path(__file__).parents[1]


def alive(config: UNetConfig, seed: int = 0) -> UNet:
    """Random weights everywhere, biases and head included, so that every channel matters."""
    torch.manual_seed(seed)
    model = UNet(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name.startswith("head"):
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other take ten times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def samples(count: int = 2, side: int = 64) -> list[tuple[Tensor, Tensor]]:
    sharp = [torch.from_numpy(photo(seed, side, side)).permute(2, 0, 1)[None].float() / 255 for seed in range(count)]
    return [(nn.functional.avg_pool2d(image, 3, 1, 1), image) for image in sharp]


@st.composite
def configs(draw: st.DrawFn) -> UNetConfig:
    widths = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)
    levels = draw(st.integers(1, 3))
    return UNetConfig(
        stem=draw(st.integers(1, 3)),
        encoder=tuple(draw(widths) for _ in range(levels)),
        up=tuple(draw(st.integers(1, 6)) for _ in range(levels - 1)),
        decoder=tuple(draw(widths) for _ in range(levels - 1)),
        residual=draw(st.booleans()),
    )


def zeroed(model: UNet, share: float, seed: int) -> dict[str, list[int]]:
    """Set random channels of every layer but the head to zero; which ones, leaving one of each at least."""
    generator, gone = torch.Generator().manual_seed(seed), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and name != "head":
            count = min(layer.out_channels - 1, round(share * layer.out_channels))
            gone[name] = torch.randperm(layer.out_channels, generator=generator)[:count].tolist()
            with torch.no_grad():
                (layer.weight.transpose(0, 1) if layer.transposed else layer.weight)[gone[name]] = 0
                layer.bias[gone[name]] = 0
    return {name: indices for name, indices in gone.items() if indices}


def check_zeros(config: UNetConfig, share: float, seed: int, height: int, width: int) -> None:
    model = alive(config, seed)
    gone = zeroed(model, share, seed)
    small = as_unet(unet_channels(model).without(gone))
    image = torch.rand(1, 3, height, width)
    with torch.no_grad():
        assert torch.allclose(small(image), model(image), atol=1e-5 * float(model(image).abs().max()))
    for name, (before, after) in sizes(model, small)["widths"].items():
        assert after == before - len(gone.get(name, []))


@settings(max_examples=15, deadline=None)
@given(configs(), st.floats(0, 1), st.integers(0, 1000), st.integers(1, 40), st.integers(1, 40))
def test_removing_zero_channels_changes_no_output(
    config: UNetConfig, share: float, seed: int, height: int, width: int
) -> None:
    if any(width > 1 for block in (*config.encoder, config.up, *config.decoder) for width in block):
        check_zeros(config, share, seed, height, width)


@pytest.mark.parametrize("name", PRESETS)
def test_removing_zero_channels_of_a_preset_changes_no_output(name: str) -> None:
    check_zeros(PRESETS[name], 0.6, 1, 35, 50)  # type: ignore[index]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("target", "share"), [("macs", 0.5), ("macs", 0.3), ("parameters", 0.4)])
def test_the_cost_is_what_hooks_on_the_convolutions_count(method: Importance, target: str, share: float) -> None:
    model = alive(UNetConfig(stem=2, encoder=((32, 32), (48, 64)), up=(32,), decoder=((32, 48),)))
    plan = plan_for(model, PruneConfig(**{target: share}, importance=method), samples())  # type: ignore[arg-type]
    small = network_of(plan, share)
    counts = []
    for net in (model, small):
        macs = 0.0

        def count(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal macs
            kernel = layer.kernel_size[0] * layer.kernel_size[1]
            places = (inputs[0] if layer.transposed else output)[0, 0].numel()
            macs += places * kernel * layer.in_channels * layer.out_channels

        hooks = [m.register_forward_hook(count) for m in net.modules() if hasattr(m, "out_channels")]  # type: ignore[arg-type]
        with torch.no_grad():
            net(torch.rand(1, 3, 32, 48))
        for hook in hooks:
            hook.remove()
        assert net.config.macs_per_pixel == pytest.approx(macs / (32 * 48))
        counts.append((macs, sum(p.numel() for p in net.parameters())))
    kept = counts[1][target == "parameters"] / counts[0][target == "parameters"]
    assert share - 0.1 < kept <= share
    assert kept == pytest.approx(plan.share(plan.widths(share)))
    assert sizes(model, small)["parameters"] == [counts[0][1], counts[1][1]]
    assert all(width % 16 == 0 or width == 48 for _, width in sizes(model, small)["widths"].values() if width != 12)


@pytest.mark.parametrize("method", ["taylor", "activation"])
def test_dead_channels_are_the_least_important(method: Importance) -> None:
    model = alive(UNetConfig(stem=2, encoder=((8,), (12, 8)), up=(8,), decoder=((8, 8),)))
    gone = zeroed(model, 0.5, 3)
    scores = score(unet_channels(model), method, samples())
    for name, indices in gone.items():
        assert set(scores[name].argsort()[: len(indices)].tolist()) == set(indices)
        assert scores[name][indices].max() < 1e-6 * scores[name].max()


def test_taylor_counts_every_weight_of_a_channel_whoever_reads_it() -> None:
    """A channel that two layers read is dearer than its like that one reads: a sum, no mean over the layers."""
    model = alive(UNetConfig(stem=2, encoder=((8,), (12, 8)), up=(8,), decoder=((8, 8),)))
    found = score(unet_channels(model), "taylor", samples(1))
    (blurred, sharp), width = samples(1)[0], 8
    model.zero_grad()
    with torch.enable_grad():
        nn.functional.l1_loss(model(blurred), sharp).backward()  # type: ignore[no-untyped-call]

    def felt(layer: nn.Conv2d, axis: int, first: int = 0) -> torch.Tensor:
        assert layer.weight.grad is not None
        values = (layer.weight * layer.weight.grad).abs().transpose(0, axis).flatten(1).sum(1)
        if axis == 0:
            assert layer.bias is not None
            assert layer.bias.grad is not None
            values = values + (layer.bias * layer.bias.grad).abs()
        return values[first : first + width].detach()

    below, behind = model.encoder[1][0], model.decoder[0][0]  # type: ignore[index]
    wanted = felt(model.first, 0) + felt(below, 1) + felt(behind, 1, first=8)
    torch.testing.assert_close(found["encoder.0.0"], wanted, rtol=1e-3, atol=1e-8)


def test_widths_are_multiples_and_networks_only_shrink() -> None:
    assert allowed_widths(64, 16) == [48, 32, 16]
    assert allowed_widths(40, 16) == [32, 16]
    assert allowed_widths(24, 16) == [16, 8]
    assert allowed_widths(6, 16) == [4, 2]
    assert allowed_widths(1, 16) == []
    plan = plan_for(alive(PRESETS["article"]), PruneConfig(macs=0.5), samples(1, 32))
    shares = [plan.share(widths) for widths in plan.path]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert {width for widths in plan.path for width in widths.values()} <= set(range(16, 128, 16))


@pytest.mark.parametrize("balance", [0.0, 0.8, 1.0])
def test_no_layer_is_narrowed_much_more_than_the_others(balance: float) -> None:
    model = alive(PRESETS["hd"])
    with torch.no_grad():
        for parameter in model.decoder[1][0].parameters():  # type: ignore[index]
            parameter[:40] = 0
    plan = plan_for(model, PruneConfig(macs=0.5, balance=balance, multiple=4), samples(1, 64))
    assert plan.widths(0.8)["decoder.1.0"] <= 24, "what does nothing goes first"
    living = {name: int((values > 0).sum()) for name, values in plan.scores.items()}
    for widths in plan.path[: len(plan.path) // 2]:
        kept = [min(1.0, widths.get(name, width) / width) for name, width in living.items()]
        # A block is up to a sixth of what lives in a layer.
        assert min(kept) >= balance * max(kept) - 1 / 6
    assert balance or min(kept) < 0.5 * max(kept), "importance alone narrows some layers more"


def test_a_pruned_network_loads_without_torch_pruning(tmp_path: Path) -> None:
    model = unet()
    small = network_of(plan_for(model, PruneConfig(macs=0.5), samples()), 0.5)
    save_checkpoint(small, tmp_path / "small.safetensors")
    code = (
        "import sys; sys.modules['torch_pruning'] = None\nfrom pathlib import Path\n"
        "from deblur_deploy.training.checkpoint import load_checkpoint\n"
        "from deblur_deploy.training.unet import parameter_count\n"
        "print(parameter_count(load_checkpoint(Path(sys.argv[1]))))"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "small.safetensors")]
    printed = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert int(printed) == parameter_count(small) < parameter_count(model)


def test_targets_out_of_reach_and_other_nonsense_are_named() -> None:
    plan = plan_for(unet(), PruneConfig(macs=0.5), samples())
    with pytest.raises(InputError, match=r"a share of 0\.001 .* keeps 0\.\d+"):
        network_of(plan, 0.001)
    assert parameter_count(network_of(plan, plan.smallest)) < parameter_count(network_of(plan, 1.0))
    assert network_of(plan, 1.0).config == unet().config, "nothing to do, nothing done"
    for values, said in (
        ({"macs": 0.0}, "macs is 0; allowed: more than 0, up to 1"),
        ({"macs": 1.5}, "macs is 1.5"),
        ({"parameters": float("nan")}, "parameters is nan"),
        ({"target_ms": -3.0}, "target_ms is -3"),
        ({"macs": 0.5, "target_ms": 3.0}, "macs and target_ms are given together"),
        ({"at": "wide"}, "at is 'wide'; allowed: WIDTHxHEIGHT"),
        ({"rounds": 0}, "rounds is 0"),
        ({"balance": 1.1}, "balance is 1.1; allowed: 0 to 1"),
    ):
        with pytest.raises(ValueError, match=said):
            PruneConfig(**values)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'taylor' needs photographs"):
        plan_for(unet(), PruneConfig(macs=0.5), [])
    assert PruneConfig(macs=0.5)
    assert not PruneConfig()


def test_what_the_graph_gets_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    channels = unet_channels(unet())
    right = Channels._cut
    monkeypatch.setattr(Channels, "_cut", lambda self, _: right(self, {"encoder.0.0": [1]}))
    with pytest.raises(VerificationError, match=r"pruning encoder\.0\.0 breaks the network: the output changes"):
        channels.without({"encoder.0.0": [0]})


def test_sensitivity_is_that_of_the_network_without_these_channels() -> None:
    model = unet()
    plan = plan_for(model, PruneConfig(macs=0.5), samples())
    found = sensitivity(plan, samples(), shares=(0.5,))
    assert list(found) == [name for name in sizes(model, model)["widths"] if name != "head"]
    name, curve = next(iter(found.items()))
    small, psnr = as_unet(plan.network({name: plan.channels.groups[name].width // 2})), 0.0
    for blurred, sharp in samples():
        with torch.no_grad():
            psnr += float(-10 * (small(blurred).clamp(0, 1) - sharp).square().mean().log10()) / 2
    assert curve[0.5] == pytest.approx(psnr, abs=1e-3)
    assert len({curve[0.0] for curve in found.values()}) == 1


class Stranger(nn.Module):
    """Somebody else's network: residual blocks, batch normalisation, a depthwise layer, a rearrangement inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 24, 3, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.outer = nn.Conv2d(24, 16, 1)
        self.wide = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(image)))
        x = x + self.outer(torch.relu(self.depthwise(torch.relu(self.inner(x)))))
        return image + self.last(self.shuffle(self.wide(x)))


def test_a_strangers_network_keeps_what_cannot_be_pruned() -> None:
    torch.manual_seed(0)
    model = Stranger()
    channels = Channels(model, torch.rand(1, 3, 16, 16), probe=True)
    together = [{part.layer for part in group.slices if part.of_outputs} for group in channels.groups.values()]
    assert sorted(together, key=len) == [{"inner", "depthwise"}, {"first", "norm", "outer"}]
    assert set(channels.left) == {"wide", "last"}
    parameters = channels.cost({})[1]
    assert parameters == parameter_count(model)
    plan = Plan(channels, PruneConfig(macs=0.7, multiple=8), samples(2, 16))
    small = plan.network(plan.widths(0.7))
    assert parameter_count(small) == channels.cost(plan.widths(0.7))[1] < parameters
    assert small(torch.rand(2, 3, 12, 20)).shape == (2, 3, 12, 20)
    assert plan.share(plan.widths(0.7)) <= 0.7


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.only = kind, nn.Conv2d(3 if kind != "channels" else 4, 3, 1)

    def forward(self, image: Tensor) -> object:
        x = self.only(image)
        if self.kind == "own":
            return x.reshape(7, 7)
        return {"list": [x], "grad": x.detach()}.get(self.kind, x)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("channels", "fails in layer only: .*4 channels"),
        ("own", "fails in the network's own forward"),
        ("list", "returns list"),
        ("grad", "no layer of the network can be pruned|cannot trace"),
        ("head", "no layer of the network can be pruned .only: the output becomes"),
    ],
)
def test_a_network_that_cannot_be_pruned_is_named(kind: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Channels(Odd(kind), torch.rand(1, 3, 8, 8), probe=True)
