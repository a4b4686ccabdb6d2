"""Finding out how a network takes images: by running it, never by its name.

Sizes are found by trying them.  What a file does not say, the range of the pixels and the order of the colours, is
guessed by what the network makes of blurred photographs whose sharp originals are known; the guess is told, and an
option overrules it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import msgspec
import numpy as np

from deblur_deploy.errors import InputError, one_line
from deblur_deploy.evaluation.quality import Pair, psnr
from deblur_deploy.pipeline.config import NetworkConfig
from deblur_deploy.pipeline.convention import Array, Convention, PlaneOrder, Reference, Runner

_SQUARES = (64, 128, 256, 32, 96, 192, 224, 512)
"""Sizes that are tried until the network takes one."""
_DIVISORS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_CROP_PX = 192
_CLEARLY_DB, _WRONG_DB = 1.0, 3.0
"""How much better than what is usual something unusual must be, and how far below the blurred images a network that is
fed as it should be does not fall; and how far one does that is fed wrongly."""


def recognise(
    run: Runner,
    name: str,
    wish: NetworkConfig,
    pairs: Sequence[Pair],
    *,
    layouts: Sequence[PlaneOrder] = ("nchw",),
    takes_bytes: bool = False,
    guess: bool = True,
) -> tuple[Convention, tuple[str, ...]]:
    """How the network ``run``, which messages call ``name``, takes images; and what there is to say about it.

    ``layouts`` are those that it may have, ``pairs`` are photographs to guess on, ``guess`` is False where range and
    colours are known.  Raises InputError that says what it takes or gives, if that is not images.
    """
    wished = wish.input
    tried = layouts if wished.layout == "auto" else [wished.layout]
    trial = _Trial(run, name, takes_bytes)
    layout, side = trial.first_size(tried)
    same = trial.images_of_same_size(layout, side)
    if wish.output and wish.output not in same:
        raise InputError(f"{name} has no output {wish.output!r} of the image's size; it has: {', '.join(same)}")
    outputs = [wish.output] if wish.output else list(same)
    if takes_bytes and wished.range not in ("auto", "255"):
        raise InputError(f"{name} takes uint8, whose range is 255; leave out --input.range {wished.range}")
    how = Convention(layout=layout, input_bytes=takes_bytes, range="255" if takes_bytes else "1", output=outputs[0])
    divisor = trial.divisor(how, wish.divisor, side)
    least = next((n for k in (1, 2, 3, 4, 6, 8) if trial.takes(how, n := k * divisor, n)), side)
    how = msgspec.structs.replace(how, divisor=divisor, least_px=least, any_batch=trial.takes(how, side, side, batch=2))
    notes = []
    if not guess:
        given = {key: value for key in ("range", "colour") if (value := getattr(wished, key)) != "auto"}
        how = msgspec.structs.replace(how, **given)
    else:
        how, said = _guess(run, how, wish, outputs, pairs)
        notes.append(f"input: {how.words()}{said}")
    if len(outputs) > 1:
        notes.append(f"of the outputs {', '.join(outputs)}, {how.output} is taken; --output names another")
    if not how.any_batch:
        notes.append("it takes one image at a time, and so do the files")
    return how, tuple(notes)


class _Trial:
    """Runs a network on noise of various sizes."""

    def __init__(self, run: Runner, name: str, takes_bytes: bool) -> None:
        self.run, self.name, self.takes_bytes = run, name, takes_bytes
        self.error = ""

    def outputs(self, layout: PlaneOrder, height: int, width: int, batch: int = 1) -> dict[str, Array] | None:
        """What the network gives for an image of this size, or None if it does not take it."""
        how = Convention(layout=layout, input_bytes=self.takes_bytes, range="255" if self.takes_bytes else "1")
        noise = np.random.default_rng(0).random((batch, 3, height, width), np.float32)
        try:
            return dict(self.run(how.to_raw(noise)))
        except Exception as error:  # somebody else's network fails with anything
            self.error = self.error or one_line(error)
            return None

    def first_size(self, layouts: Sequence[PlaneOrder]) -> tuple[PlaneOrder, int]:
        """A layout and the side of a square that work."""
        for side, layout in product(_SQUARES, layouts):
            if self.outputs(layout, side, side) is not None:
                return layout, side
        raise InputError(f"{self.name} does not run on an RGB image of any size that was tried: {self.error}")

    def images_of_same_size(self, layout: PlaneOrder, side: int) -> list[str]:
        """Names of the outputs that are RGB images of the input's size; raises InputError if there are none."""
        found = self.outputs(layout, side, side) or {}
        wanted = (1, 3, side, side) if layout == "nchw" else (1, side, side, 3)
        same = [name for name, value in found.items() if value.shape == wanted and value.dtype.kind in "fu"]
        if same:
            return same
        axis = 1 if layout == "nchw" else 3
        for value in found.values():
            if value.ndim == 4 and value.shape[axis] == 3:
                factor = value.shape[2] / side
                raise InputError(
                    f"{self.name} makes images {factor:g} times as large as they were; only networks that keep the "
                    "size are exported"
                )
        shapes = ", ".join(f"{name} of shape {'x'.join(map(str, of.shape))}" for name, of in found.items())
        raise InputError(
            f"{self.name} is no network from images to images: for an RGB image of {side}x{side} it gives "
            f"{shapes or 'nothing'}"
        )

    def takes(self, how: Convention, height: int, width: int, batch: int = 1) -> bool:
        """Whether images of this size come out at the same size."""
        found = self.outputs(how.layout, height, width, batch=batch)
        wanted = (batch, 3, height, width) if how.layout == "nchw" else (batch, height, width, 3)
        return found is not None and how.output in found and found[how.output].shape == wanted

    def divisor(self, how: Convention, wished: int | None, side: int) -> int:
        """The least number of whose multiples the network takes all."""
        self.error = ""
        for divisor in (wished,) if wished else _DIVISORS:
            # Odd multiples, so that nothing passes by having more factors than it must.
            tall, wide = (divisor * (2 * max(1, px // divisor) + 1) for px in (24, 40))
            if self.takes(how, tall, wide) and self.takes(how, wide, tall):
                return divisor
        why = f": {self.error}" if self.error else ""
        if wished:
            raise InputError(f"{self.name} does not take all multiples of {wished} (--divisor){why}")
        raise InputError(f"{self.name} works on {side}x{side} only, and not on every multiple of a number{why}")


def _guess(
    run: Runner, how: Convention, wish: NetworkConfig, outputs: Sequence[str], pairs: Sequence[Pair]
) -> tuple[Convention, str]:
    """The convention in which the network restores best, and how much better that is."""
    wished = wish.input
    ranges = [wished.range] if wished.range != "auto" else ["255"] if how.input_bytes else ["1", "255", "-1"]
    colours = [wished.colour] if wished.colour != "auto" else ["rgb", "bgr"]
    crops = [pair.centre(_CROP_PX) for pair in pairs[::3]]
    blurred = float(np.mean([psnr(pair.blurred, pair.sharp) for pair in crops]))
    found: list[tuple[Convention, float]] = []
    for span, colour, output in product(ranges, colours, outputs):
        tried = msgspec.structs.replace(how, range=span, colour=colour, output=output)
        found.append((tried, _quality(Reference(run, tried), crops)))
    # In this order, so that what is unusual must be clearly better, and what is usual clearly wrong.
    best = found[0]
    for one in found:
        alike = (one[0].range, one[0].colour) == (best[0].range, best[0].colour)
        better = one[1] > max(best[1], blurred - 2 * _CLEARLY_DB) + _CLEARLY_DB and found[0][1] < blurred - _WRONG_DB
        if one[1] > best[1] if alike else better:
            best = one
    if len(ranges) == len(colours) == 1:
        return best[0], ""
    others = [value for tried, value in found if (tried.range, tried.colour) != (best[0].range, best[0].colour)]
    said = f" ({best[1]:.1f} dB on photographs of {blurred:.1f}, others at most {max(others):.1f}; "
    return best[0], f"{said}--input.range and --input.colour overrule it)"


def _quality(restore: Reference, crops: Sequence[Pair]) -> float:
    try:
        return float(np.mean([psnr(restore(pair.blurred), pair.sharp) for pair in crops]))
    except Exception:  # as above: then it is none that it takes
        return -np.inf
