"""What a person looks at: samples before training, the learning curve and restored crops after it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np

from deblur_deploy.evaluation.quality import Pair, Restorer, psnr
from deblur_deploy.files import writing_file
from deblur_deploy.media.images import Image, write_image
from deblur_deploy.training.batches import Batch, Batches
from deblur_deploy.training.log import read_log
from deblur_deploy.training.validation import PairSets, middle


def preview(batches: Batches, count: int, path: Path) -> None:
    """A sheet of ``count`` training samples, each blurred beside sharp, as the first steps will see them."""
    pairs: list[Pair] = []
    step = 0
    while len(pairs) < count:
        batch = batches[step]
        pairs += [pair for pair in as_pairs(batch) if not pairs or pair.sharp.shape == pairs[0].sharp.shape]
        step += 1
    tiles = [np.concatenate([pair.blurred, pair.sharp], axis=1) for pair in pairs[:count]]
    columns = max(1, round((count / 2) ** 0.5))
    tiles += [np.full_like(tiles[0], 255)] * (-count % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    write_image(path, np.concatenate(rows))


def as_pairs(batch: Batch) -> list[Pair]:
    """The finished samples of a batch, one by one."""
    sides = zip(batch.names, *(_images(images) for images in (batch.blurred, batch.sharp)), strict=True)
    return [Pair(name=name, blurred=blurred, sharp=sharp) for name, blurred, sharp in sides]


def _images(batch: object) -> list[Image]:
    return [np.ascontiguousarray(image) for image in np.asarray(batch).transpose(0, 2, 3, 1)]


def learning_curve(log: Path, path: Path) -> None:
    """Loss and learning rate, and the gain on each validation set, over steps."""
    from matplotlib.figure import Figure  # here, so that training runs where nothing can draw

    rows = read_log(log)
    sets = [name.removesuffix("_gain_db") for name in (rows[0] if rows else {}) if name.endswith("_gain_db")]
    sets = [name for name in sets if not name.endswith("_worst")]
    figure = Figure(figsize=(9, 6 if sets else 3.5), layout="constrained")
    axes = figure.subplots(2 if sets else 1, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].plot([int(row["step"]) for row in rows], [float(row["loss"]) for row in rows], linewidth=1)
    axes[0].set(ylabel="training loss", yscale="log")
    rate = axes[0].twinx()
    rate.plot([int(row["step"]) for row in rows], [float(row["learning_rate"]) for row in rows], "0.7", linewidth=1)
    rate.set_ylabel("learning rate")
    for name in sets:
        known = [(int(row["step"]), float(row[f"{name}_gain_db"])) for row in rows if row[f"{name}_gain_db"]]
        axes[1].plot(*zip(*known, strict=True), marker=".", label=name) if known else None
    if sets:
        axes[1].axhline(0, color="0.7", linewidth=1)
        axes[1].set_ylabel("PSNR gain over the input, dB")
        axes[1].legend()
    axes[-1].set_xlabel("step")
    with writing_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def before_after(restorer: Restorer, sets: PairSets, path: Path, *, rows_a_set: int = 3, side_px: int = 256) -> None:
    """A sheet of the middle of a few pairs of each set: input, result, truth; no more of a pair is restored."""
    from matplotlib.figure import Figure  # as above

    pairs = [pair for pairs in sets.values() for pair in islice(pairs, rows_a_set)]
    figure = Figure(figsize=(9, 3.2 * len(pairs)), layout="constrained")
    for axes, pair in zip(figure.subplots(len(pairs), 3, squeeze=False), pairs, strict=True):
        pair = middle(pair, 3 * side_px, 2 * side_px)
        restored = restorer(pair.blurred)
        shown = (
            (f"{pair.name}\nbefore, {psnr(pair.blurred, pair.sharp):.2f} dB", pair.blurred),
            (f"after, {psnr(restored, pair.sharp):.2f} dB", restored),
            ("truth", pair.sharp),
        )
        top, left = ((length - min(length, side_px)) // 2 for length in pair.sharp.shape[:2])
        for axis, (title, image) in zip(axes, shown, strict=True):
            axis.imshow(image[top : top + side_px, left : left + side_px])
            axis.set_title(title, fontsize=8)
            axis.axis("off")
    with writing_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
