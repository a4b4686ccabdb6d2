"""Every loss is zero for equal images, positive otherwise, and what its source says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from deblur_deploy.errors import InputError, MissingFileError
from deblur_deploy.training import losses
from deblur_deploy.training.config import LOSS_NAMES
from deblur_deploy.training.losses import LOSSES, Perceptual, parse_loss
from tests.photos import photo


def batch(seed: int) -> Tensor:
    return torch.from_numpy(photo(seed, 64, 72)).permute(2, 0, 1)[None].float() / 255


def vgg_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random weights in torchvision's layout, with the layers that it has beyond those that we need."""
    generator, weights, channels = torch.Generator().manual_seed(seed), dict[str, Tensor](), 3
    for index, width in ((0, 64), (2, 64), (5, 128), (7, 128), (10, 256), (12, 256), (14, 256), (16, 256)):
        scale = (2 / (9 * channels)) ** 0.5
        weights[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * scale
        weights[f"features.{index}.bias"] = torch.zeros(width)
        channels = width
    return weights | {"classifier.0.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize("name", [*LOSSES, "perceptual"])
def test_zero_only_for_equal_images_and_smaller_when_closer(name: str) -> None:
    loss = Perceptual(vgg_weights()) if name == "perceptual" else LOSSES[name]
    truth, other = batch(0), batch(1)
    none, near, far = (loss(truth + share * (other - truth), truth).item() for share in (0.0, 0.1, 1.0))
    assert none == pytest.approx(0, abs=2e-3)  # Charbonnier's epsilon
    assert none < near < far


@pytest.mark.parametrize("name", [*LOSSES, "perceptual"])
def test_gradients_reach_the_image(name: str) -> None:
    loss = Perceptual(vgg_weights()) if name == "perceptual" else LOSSES[name]
    image = batch(1).requires_grad_()
    loss(image, batch(0)).backward()
    assert image.grad is not None
    assert torch.isfinite(image.grad).all()
    assert image.grad.abs().sum() > 0


def test_ssim_equals_scikit_images() -> None:
    a, b = (batch(seed)[0].permute(1, 2, 0).double().numpy() for seed in (0, 1))
    _, full = structural_similarity(
        a, b, channel_axis=2, gaussian_weights=True, use_sample_covariance=False, data_range=1, full=True
    )
    ours = 1 - losses.ssim(batch(0).double(), batch(1).double()).item()
    assert ours == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-5)


def test_fft_loss_equals_numpys_spectrum() -> None:
    difference = (batch(0) - batch(1))[0].double().numpy()
    expected = np.abs(np.fft.rfft2(difference, norm="ortho")).mean()
    assert losses.fft(batch(0), batch(1)).item() == pytest.approx(expected, rel=1e-4)


def test_psnr_loss_is_what_the_images_lack_to_40_db_on_average() -> None:
    truth = torch.cat([batch(0), batch(1)])
    image = (truth + torch.tensor([0.1, 0.2]).view(2, 1, 1, 1)).double()  # 20 and 14 dB
    pairs = zip(image.numpy(), truth.double().numpy(), strict=True)
    lacking = [40 - peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]
    assert losses.psnr(image, truth).item() == pytest.approx(np.mean(lacking), abs=0.05)


def test_a_weighted_sum_is_one() -> None:
    a, b = batch(0), batch(1)
    expected = 0.5 * LOSSES["l1"](a, b) + 0.05 * LOSSES["fft"](a, b) + LOSSES["mse"](a, b)
    assert parse_loss("l1=0.5, fft=0.05,mse")(a, b).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_perceptual_takes_torchvisions_file_and_moves_with_the_sum(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"vgg19{suffix}"
    save_file(vgg_weights(), path) if suffix == ".safetensors" else torch.save(vgg_weights(), path)
    loss = parse_loss("l1=1,perceptual=0.1", path)
    a, b = batch(0), batch(1)
    expected = LOSSES["l1"](a, b) + 0.1 * Perceptual(vgg_weights())(a, b)
    assert loss(a, b).item() == pytest.approx(expected.item())
    assert not [parameter for parameter in loss.parameters() if parameter.requires_grad]
    assert all(parameter.is_meta for parameter in loss.to("meta").parameters())


@pytest.mark.parametrize(
    ("text", "said"),
    [("l3=1", "loss 'l3' is unknown"), ("l1=x", "no positive weight"), ("l1=-1", "no positive weight"),
     ("l1=nan", "no positive weight"), ("", "loss '' is unknown"), ("perceptual=1", "--vgg-weights")],
)  # fmt: skip
def test_a_bad_loss_is_named(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_loss(text)


def test_bad_vgg_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"none\.pth"):
        parse_loss("perceptual=1", tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match="cannot read VGG19 weights"):
        parse_loss("perceptual=1", tmp_path / "text.pth")
    for name, change in (("lacks", None), ("shape", torch.zeros(1, 3, 3, 3))):
        weights = vgg_weights()
        weights.pop("features.14.bias") if change is None else weights.update({"features.0.weight": change})
        torch.save(weights, tmp_path / f"{name}.pth")
        with pytest.raises(InputError, match="VGG19"):
            parse_loss("perceptual=1", tmp_path / f"{name}.pth")


def test_a_config_knows_every_loss() -> None:
    assert {*LOSS_NAMES} == {*LOSSES, "perceptual"}
