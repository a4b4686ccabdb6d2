"""A scene in layers: what is in front hides what is behind, at each moment, and no light is lost."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deblur_deploy.training.blur import BlurPlan, synthesise
from deblur_deploy.training.motion import Array, draw_path
from deblur_deploy.training.scene import Layer, Scene, draw_scene, expose
from tests.photos import photo

HALF = np.repeat(np.linspace(1, -1, 4, dtype=np.float32)[None], 4, axis=0)
"""In front on the left, nothing on the right."""


def poses(x: float, count: int = 9) -> Array:
    path = np.zeros((count, 4), np.float32)
    path[:, 0] = np.linspace(-x, x, count)
    return path


def scene(background: float, thing: float, tilt: tuple[float, float] = (0, 0)) -> Scene:
    layer = Layer(poses=poses(thing), field=HALF, steepness=200)
    return Scene(poses=poses(background), tilt=tilt, layers=(layer,))


def photographs(count: int, side: int = 64) -> torch.Tensor:
    return torch.from_numpy(np.stack([photo(seed, side, side) for seed in range(count)])).permute(0, 3, 1, 2) / 255


def test_what_stands_still_is_the_scene_itself() -> None:
    images = photographs(2)
    light, truth = expose(images, scene(0, 0), 0)
    assert torch.allclose(light, truth, atol=1e-4)
    assert torch.allclose(truth[:, :, :20], images[1, :, :, :20], atol=1e-3)
    assert torch.allclose(truth[:, :, -20:], images[0, :, :, -20:], atol=1e-3)


@pytest.mark.parametrize("gamma", [1.0, 2.2])
def test_where_nothing_moves_the_truth_is_the_photograph_at_soft_edges_too(gamma: float) -> None:
    still = Scene(poses=poses(0), tilt=(0, 0), layers=(Layer(poses=poses(0), field=HALF, steepness=8),))
    photographed = (photographs(2, 96) * 255).round().to(torch.uint8)
    blurred, truth = synthesise(photographed, [BlurPlan(kind="scene", scene=still, gamma=gamma)], 16)
    assert (blurred.int() - truth.int()).abs().max() <= 1


def test_a_thing_moves_before_a_still_background_and_hides_it_for_a_part_of_the_exposure() -> None:
    white, black = torch.ones(3, 64, 64), torch.zeros(3, 64, 64)
    light, truth = expose(torch.stack([black, white]), scene(0, 8), 0)
    row = light[0, 32]
    assert (row[:20] > 0.99).all()
    assert (row[-20:] < 0.01).all()
    assert (row[26:38] - row[25:37]).max() <= 1e-6, "the edge falls over the whole path"
    assert ((row > 0.05) & (row < 0.95)).sum() >= 12
    assert light.sum().item() == pytest.approx(truth.sum().item(), rel=0.01)


def test_what_is_nearer_moves_further() -> None:
    images = photographs(1, 96)
    tilted = Scene(poses=poses(4), tilt=(0.9, 0.0), layers=())
    light, truth = expose(images, tilted, 0)
    change = (light - truth).abs().mean((0, 1))
    assert change[-30:-5].mean() > 2 * change[5:30].mean()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4))
def test_every_path_is_zero_at_mid_exposure_and_stays_in_reach(seed: int, most: int) -> None:
    drawn = draw_scene((3.0, 36.0), 0.02, 0.02, most, np.random.default_rng(seed))
    assert len(drawn.layers) <= most
    for path in (drawn.poses, *(layer.poses for layer in drawn.layers)):
        assert len(path) == len(drawn.poses)
        assert len(path) % 2 == 1
        assert np.abs(path[len(path) // 2]).max() < 1e-5
        assert np.linalg.norm(path[:, :2], axis=1).max() <= 18 + 1e-3
        assert np.linalg.norm(np.diff(path[:, :2], axis=0), axis=1).max() < 8, "no gaps that would show as ghosts"


def test_a_path_without_centre_starts_from_its_middle() -> None:
    path = draw_path(20, np.random.default_rng(3), rotation=0.02, zoom=0.01, centre=False)
    assert np.abs(path[len(path) // 2]).max() == 0
    assert np.abs(path[:, 2]).max() <= 0.02
