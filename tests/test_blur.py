"""Blur does what light does: it keeps its sum, its centre and, where nothing moves, the picture."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import convolve as reference_convolve
from scipy.ndimage import shift as reference_shift

from deblur_deploy.errors import InputError
from deblur_deploy.training import kernels, motion
from deblur_deploy.training.blur import BlurConfig, BlurPlan, draw_plan, synthesise
from tests.photos import photo

KINDS = ("scene", "shake", "object", "defocus", "gaussian", "measured", "sharp")
CLEAN = {"highlights": 0.0, "noisy": 0.0, "jpeg": 0.0}
SEEDS = st.integers(0, 2**32 - 1)


def only(kind: str, **changes: object) -> BlurConfig:
    return msgspec.structs.replace(BlurConfig(), **{name: float(name == kind) for name in KINDS}, **CLEAN, **changes)


def patches(count: int = 2, side: int = 120) -> torch.Tensor:
    return torch.from_numpy(np.stack([photo(seed, side, side) for seed in range(count)])).permute(0, 3, 1, 2)


def light(image: torch.Tensor, gamma: float = 2.2) -> torch.Tensor:
    return (image.float() / 255) ** gamma


@pytest.mark.parametrize("kind", ["shake", "defocus", "gaussian"])
def test_a_grey_wall_stays_a_grey_wall(kind: str) -> None:
    config, wall = only(kind), torch.full((3, 3, 120, 120), 137, dtype=torch.uint8)
    rng = np.random.default_rng(0)
    blurred, truth = synthesise(wall, [draw_plan(config, rng) for _ in wall], config.margin_px)
    assert (blurred == 137).all()
    assert (truth == 137).all()


@pytest.mark.parametrize("kind", ["shake", "defocus", "gaussian"])
def test_a_bright_point_keeps_its_light_and_its_place(kind: str) -> None:
    config, rng = only(kind, rotation_deg=0.0, zoom=0.0), np.random.default_rng(1)
    side = 48 + 2 * config.margin_px
    for _ in range(8):
        point = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        point[:, :, side // 2 - 1 : side // 2 + 2, side // 2 - 1 : side // 2 + 2] = 255
        plan = draw_plan(config, rng)
        image = light(point)[0]
        if plan.poses is not None:
            image = motion.warped(image, plan.poses).mean(0)
        if plan.kernel is not None:
            image = kernels.convolve(image[None], torch.from_numpy(plan.kernel)[None])[0]
        assert image.sum().item() == pytest.approx(27, rel=1e-3)
        where = torch.arange(side, dtype=torch.float32)
        for axis in (1, 2):
            centre = (image[0].sum(2 - axis) * where).sum() / image[0].sum()
            assert centre.item() == pytest.approx(side // 2, abs=0.02)


def test_a_still_camera_changes_nothing() -> None:
    config, sharp = BlurConfig(), patches()
    m = config.margin_px
    still = BlurPlan(kind="shake", poses=np.zeros((5, 4), np.float32))
    point = BlurPlan(kind="measured", kernel=np.ones((1, 1), np.float32))
    blurred, truth = synthesise(sharp, [still, point], m)
    assert torch.equal(truth, sharp[..., m:-m, m:-m])
    # Coordinates and the Fourier transform round: a hundred-thousandth of a bright neighbour is a level near black.
    difference = (blurred.int() - truth.int()).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() < 1e-3


def test_sharp_samples_are_left_alone() -> None:
    config, sharp = only("sharp"), patches()
    m = config.margin_px
    blurred, truth = synthesise(sharp, [draw_plan(config, np.random.default_rng(0))] * 2, m)
    assert torch.equal(blurred, sharp[..., m:-m, m:-m])
    assert torch.equal(truth, blurred)


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.sampled_from(KINDS))
def test_kernels_sum_to_one_and_paths_are_centred(seed: int, kind: str) -> None:
    plan = draw_plan(only(kind), np.random.default_rng(seed))
    if plan.kernel is not None:
        assert plan.kernel.shape[0] == plan.kernel.shape[1]
        assert plan.kernel.shape[0] % 2 == 1
        assert plan.kernel.sum() == pytest.approx(1, abs=1e-5)
        assert (plan.kernel >= 0).all()
    if plan.poses is not None:
        assert np.abs(plan.poses.mean(axis=0)).max() < 1e-4
        assert np.linalg.norm(plan.poses[:, :2], axis=1).max() <= BlurConfig().path_px[1] / 2 + 1e-3


@pytest.mark.parametrize("side", [1, 3, 9, 25])
def test_convolve_equals_scipy(side: int) -> None:
    rng = np.random.default_rng(side)
    image, kernel = rng.random((3, 40, 52), np.float32), rng.random((side, side), np.float32)
    ours = kernels.convolve(torch.from_numpy(image)[None], torch.from_numpy(kernel)[None])[0].numpy()
    expected = np.stack([reference_convolve(plane, kernel, mode="wrap") for plane in image])
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (0, -2), (1.5, 0.25)])
def test_a_shifted_pose_equals_scipys_shift(dx: float, dy: float) -> None:
    image = np.random.default_rng(0).random((1, 40, 52), np.float32)
    pose = np.array([[dx, dy, 0, 0]], np.float32)
    ours = motion.warped(torch.from_numpy(image), pose, 4)[0, 0].numpy()
    expected = reference_shift(image[0], (-dy, -dx), order=1, mode="nearest")[4:-4, 4:-4]
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_blur_varies_over_the_image() -> None:
    config, sharp = BlurConfig(), patches(1, 160)
    turn = np.zeros((9, 4), np.float32)
    turn[:, 2] = np.linspace(-0.05, 0.05, 9)
    blurred, truth = synthesise(sharp, [BlurPlan(kind="shake", poses=turn)], config.margin_px)
    change = (blurred.float() - truth.float()).abs().mean((0, 1))
    middle = slice(len(change) // 2 - 8, len(change) // 2 + 8)
    assert change[middle, middle].mean() < 0.5 * change.mean()


def test_an_object_moves_over_a_still_background() -> None:
    config, sharp = only("object"), patches(1, 160)
    blob = np.full((5, 5), -1, np.float32)
    blob[:, :2] = 1
    poses = np.zeros((9, 4), np.float32)
    poses[:, 0] = np.linspace(-6, 6, 9)
    blurred, truth = synthesise(sharp, [BlurPlan(kind="object", poses=poses, blob=blob)], config.margin_px)
    change = (blurred.float() - truth.float()).abs().mean((0, 1, 2))
    third = len(change) // 3
    assert change[: third // 2].mean() > 3
    assert change[-third:].max() < 0.5


@pytest.mark.parametrize("gamma", [1.0, 1.6, 2.2])
def test_highlights_clip_after_the_sum(gamma: float) -> None:
    """A saturated dot smeared over a few pixels stays white, since it was brighter than white."""
    config = BlurConfig()
    side = 32 + 2 * config.margin_px
    dot = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    dot[..., side // 2, :] = 255
    poses = np.zeros((3, 4), np.float32)
    poses[:, 1] = (-1, 0, 1)
    plans = [BlurPlan(kind="shake", poses=poses, highlight_gain=gain, gamma=gamma) for gain in (0.0, 8.0)]
    blurred, truth = synthesise(dot, plans, config.margin_px)
    assert blurred[0].max() == round(255 * (1 / 3) ** (1 / gamma))
    assert blurred[1].max() == 255
    assert torch.equal(truth[0], truth[1])


def test_noise_has_the_variance_that_was_drawn() -> None:
    config = BlurConfig()
    grey = torch.full((1, 3, 200, 200), 180, dtype=torch.uint8)
    plan = BlurPlan(kind="sharp", read_noise=0.01, shot_noise=0.001, noise_seed=3)
    blurred, truth = synthesise(grey, [plan], config.margin_px)
    level = float(light(truth).mean())
    assert light(blurred).var().item() == pytest.approx(0.01**2 + 0.001 * level, rel=0.05)


def test_a_share_of_samples_has_a_flatter_curve() -> None:
    config = BlurConfig(flatter=0.3, undecoded=0.2)
    gammas = np.array([draw_plan(config, np.random.default_rng(seed)).gamma for seed in range(400)])
    assert ((gammas >= 1) & (gammas <= 2.2)).all()
    assert 0.4 < (gammas < 2.2).mean() < 0.6
    assert 0.13 < (gammas == 1).mean() < 0.27


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_the_seed_decides_whatever_batch_a_patch_is_in(seed: int) -> None:
    config = BlurConfig()
    plans = [draw_plan(config, np.random.default_rng((seed, i))) for i in range(3)]
    sharp = patches(sum(plan.photographs for plan in plans), 96)
    ends = [0, *accumulate(plan.photographs for plan in plans)]
    again = [draw_plan(config, np.random.default_rng((seed, i))) for i in range(3)]
    together = synthesise(sharp, plans, config.margin_px)
    repeated = synthesise(sharp, again, config.margin_px)
    assert all(torch.equal(a, b) for a, b in zip(together, repeated, strict=True))
    for i in range(3):
        alone = synthesise(sharp[ends[i] : ends[i + 1]], plans[i : i + 1], config.margin_px)
        for a, b in zip(alone, together, strict=True):
            # A vectorised sum may round differently at another place in memory: one level, rarely.
            assert (a[0].int() - b[i].int()).abs().max() <= 1
            assert (a[0] != b[i]).float().mean() < 1e-3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_the_gpu_makes_the_same_blur() -> None:
    config = msgspec.structs.replace(BlurConfig(), noisy=0.0)
    plans = [draw_plan(config, np.random.default_rng(i)) for i in range(8)]
    sharp = patches(sum(plan.photographs for plan in plans), 120)
    here = synthesise(sharp, plans, config.margin_px)
    there = synthesise(sharp.cuda(), plans, config.margin_px)
    for a, b in zip(here, there, strict=True):
        assert (a.float() - b.cpu().float()).abs().mean() < 0.1


def test_measured_kernels_come_back_as_they_are_but_turned(tmp_path: Path) -> None:
    kernel = np.zeros((2, 5, 5))
    kernel[0, 2, 3], kernel[1, 1, 1] = 4, 2
    np.savez(tmp_path / "kernels.npz", a=kernel, b=np.ones((3, 3)))
    loaded = kernels.load_kernels(str(tmp_path / "kernels.npz"), 5)
    assert [k.shape for k in loaded] == [(5, 5), (5, 5), (3, 3)]
    assert all(k.sum() == pytest.approx(1) for k in loaded)
    plan = draw_plan(only("measured"), np.random.default_rng(0), loaded[:1])
    assert plan.kernel is not None
    assert sorted(plan.kernel.flatten()) == sorted(loaded[0].flatten())


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot read"), (b"text", "cannot read"), (np.ones((4, 4)), "odd side"), (np.ones(3), "odd side"),
     (np.ones((7, 7)), "of 7 px, but patches have a border for 5"),
     (np.zeros((3, 3)), "sum"), (np.full((3, 3), np.nan), "sum")],
)  # fmt: skip
def test_bad_kernels_are_an_input_error(content: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, content)
    with pytest.raises(InputError, match=said):
        kernels.load_kernels(str(path), 5)


@pytest.mark.parametrize(
    "change",
    [{"shake": 1.5}, dict.fromkeys(KINDS, 0.0), {"path_px": (5.0, 2.0)}, {"path_px": (1.0, 99.0)},
     {"jpeg_quality": (0.5, 90.0)}, {"gamma": 0.0}, {"flatter": 2.0}, {"undecoded": -1.0},
     {"layers": 9}, {"rotation_deg": -1.0}, {"zoom": float("nan")}],
)  # fmt: skip
def test_a_bad_config_is_named(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        msgspec.structs.replace(BlurConfig(), **change)
