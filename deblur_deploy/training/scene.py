"""A scene in layers: a background and what stands in front of it, each moving in its own way while the shutter is open.

Real motion blur is not one kernel over a picture: what is near moves further, a person walks before a wall, and the
wall behind is seen for a part of the exposure.  So at every moment the layers are put over each other anew, and the
light of all moments is averaged.  The truth is the scene at mid exposure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deblur_deploy.training.motion import Array, Range, draw_path, log_uniform, warped


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One thing in front of the background."""

    poses: Array
    """(P, 4) as of the background, P the same."""
    field: Array
    """(K, K) low-frequency noise; the thing is where it is positive."""
    steepness: float
    """How suddenly its edge falls off: 200 is a hard one, 8 is smoke or hair."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything random about the motion in one scene, drawn."""

    poses: Array
    """(P, 4): shift in x and y (pixels), rotation (radians), log zoom of the background; zero at mid exposure."""
    tilt: tuple[float, float]
    """By which share the background's shift grows to the right and downwards."""
    layers: tuple[Layer, ...]
    """Furthest first; each takes a photograph of its own."""


def draw_scene(path_px: Range, rotation: float, zoom: float, most: int, rng: np.random.Generator) -> Scene:
    """Draw one scene; ``most``: layers at the most, the other limits as in ``BlurConfig`` (``rotation`` in radians)."""
    extent = log_uniform(path_px, rng).item()
    share = extent / path_px[1]
    camera = draw_path(extent, rng, rotation=rotation * share, zoom=zoom * share, centre=False)
    still = most > 0 and rng.random() < 0.3
    count = int(rng.integers(1 if still else 0, most + 1))
    owns = [draw_path(log_uniform(path_px, rng).item(), rng, centre=False) for _ in range(count)]
    # As many moments as the longest path needs, or the others would leave ghosts.
    moments = max(len(path) for path in (camera, *owns))
    camera, *owns = (_resampled(path, moments) for path in (camera, *owns))
    layers = []
    for depth, own in zip(np.sort(rng.uniform(1.0, 2.5, count)), owns, strict=True):
        # Things walk through the picture while the camera is held still, or are carried along by its shake.
        poses = camera * [depth, depth, 1, 1] * (not still) + own * (still or rng.random() < 0.6)
        poses[:, :2] /= max(np.linalg.norm(poses[:, :2], axis=1).max() / (path_px[1] / 2), 1)
        field = rng.normal(rng.uniform(-0.4, 0.4), 1.0, (rng.integers(3, 9),) * 2)
        steepness = log_uniform((8, 200), rng).item()
        layers.append(Layer(poses=poses.astype(np.float32), field=field.astype(np.float32), steepness=steepness))
    tilt = rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6)
    # A still camera moves by a tenth, since nobody stands like a wall.
    return Scene(poses=(camera * (0.1 if still else 1)).astype(np.float32), tilt=tilt, layers=tuple(layers))


def expose(light: Tensor, scene: Scene, cut: int) -> tuple[Tensor, Tensor]:
    """Average of the scene's light over the exposure, without ``cut`` pixels at each border; its light at mid exposure.

    ``light``, (1 + layers, 3, H, W), are the photographs of background and layers in linear light.
    """
    size = light.shape[-2:]
    now = warped(light[0], scene.poses, cut, scene.tilt)
    sharp = light[0]
    for i, layer in enumerate(scene.layers, 1):
        field = torch.from_numpy(layer.field)[None, None].to(light.device)
        smooth = F.interpolate(field, size, mode="bicubic", align_corners=True)[0]
        mask = torch.sigmoid(layer.steepness * smooth)
        moving = warped(torch.cat([light[i] * mask, mask]), layer.poses, cut)
        now = moving[:, :3] + now * (1 - moving[:, 3:])
        sharp = light[i] * mask + sharp * (1 - mask)
    return now.mean(0), sharp


def _resampled(path: Array, count: int) -> Array:
    """The same path at ``count`` moments (odd, so that its middle stays)."""
    at = np.linspace(0, len(path) - 1, count)
    return np.stack([np.interp(at, np.arange(len(path)), column) for column in path.T], axis=1).astype(np.float32)
