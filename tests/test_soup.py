"""Means of weights: the shares that restore best are found, and what is written is that mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import soup
from deblur_deploy.errors import InputError, OutputError
from deblur_deploy.training.checkpoint import load_checkpoint, save_checkpoint
from tests import small
from tests.photos import write_pairs


@pytest.mark.parametrize(
    ("best", "shares"),
    [(0.0, {"a": 1.0}), (1.0, {"b": 1.0}), (0.5, {"a": 0.5, "b": 0.5}), (0.2, {"a": 0.8, "b": 0.2})],
)
def test_shares_near_the_best_are_found(best: float, shares: dict[str, float]) -> None:
    asked = []

    def gain(tried: soup.Shares) -> float:
        asked.append(dict(tried))
        return -((tried.get("b", 0.0) - best) ** 2)

    assert soup.select(["a", "b"], gain, 8) == (shares, pytest.approx(gain(shares), abs=1e-12))
    assert len(asked) - 1 == len({str(one) for one in asked[:-1]})


def arguments(folder: Path, *names: str) -> list[str]:
    paths = [str(folder / name) for name in names]
    return [*paths, "--val", str(folder / "pairs"), "--out", str(folder / "mean.safetensors")]


def test_a_mean_is_written_with_its_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "pairs", 2)
    good, states = small.unet(), []
    for name, sign in (("one", 1), ("two", -1)):
        # Errors that cancel, so that the mean of the two is the network that restores the pairs best.
        net = small.unet()
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in net.parameters():
                weight.add_(sign * 0.2 * torch.randn_like(weight))
        save_checkpoint(net, tmp_path / f"{name}.safetensors")
        states.append(net.state_dict())
    assert soup.command(arguments(tmp_path, "one.safetensors", "two.safetensors")) == 0
    said = json.loads(capsys.readouterr().out)
    shares = list(said["shares"].values())
    assert shares == [0.5, 0.5]
    mean = load_checkpoint(tmp_path / "mean.safetensors")
    assert mean.config == good.config
    for key, value in mean.state_dict().items():
        torch.testing.assert_close(value, sum(share * state[key] for share, state in zip(shares, states, strict=True)))


def test_a_folder_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "mean.safetensors").mkdir()
    with pytest.raises(OutputError, match="is a folder, a file is needed"):
        soup.command(arguments(tmp_path, "one.safetensors", "two.safetensors"))


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 1)
    save_checkpoint(small.unet(), tmp_path / "one.safetensors")
    save_checkpoint(small.unet("classic"), tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="two or more checkpoints of one shape"):
        soup.command(arguments(tmp_path, "one.safetensors", "two.safetensors"))
    assert not (tmp_path / "mean.safetensors").exists()
