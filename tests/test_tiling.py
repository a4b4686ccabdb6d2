"""What the tile plan promises; that the pixels then agree is test_engine's."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deblur_deploy.runtime import tiling
from deblur_deploy.runtime.tiling import plan_tiles


@settings(max_examples=300, deadline=None)
@given(
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    divisor=st.sampled_from([1, 2, 4, 16]),
    radius_px=st.integers(0, 60),
    max_pixels=st.integers(1, 60_000),
)
def test_tiles_cover_the_image_on_the_grid_with_margins(
    size: tuple[int, int], divisor: int, radius_px: int, max_pixels: int
) -> None:
    plan = plan_tiles(*size, divisor=divisor, radius_px=radius_px, max_pixels=max_pixels)
    smallest = 2 * (radius_px + divisor) + divisor
    assert plan.height * plan.width <= max(max_pixels, smallest**2)
    for length, tile, spans in ((size[0], plan.height, plan.rows), (size[1], plan.width, plan.columns)):
        end = -(-length // divisor) * divisor
        assert tile % divisor == 0
        done = 0
        for span in spans:
            assert span.place.start == done < span.place.stop
            done = span.place.stop
            assert span.start % divisor == 0
            assert 0 <= span.start <= end - tile
            assert span.start + span.keep.start == span.place.start
            assert span.start + span.keep.stop == span.place.stop
            assert span.start == 0 or span.place.start - span.start >= radius_px
            assert span.start + tile == end or span.start + tile - span.place.stop >= radius_px
        assert done == length


@given(size=st.tuples(st.integers(1, 2000), st.integers(1, 2000)), spare=st.integers(0, 1000))
def test_an_image_that_fits_is_one_tile(size: tuple[int, int], spare: int) -> None:
    height, width = (-(-n // 16) * 16 for n in size)
    plan = plan_tiles(*size, divisor=16, radius_px=95, max_pixels=height * width + spare)
    assert (plan.height, plan.width, len(plan.rows), len(plan.columns)) == (height, width, 1, 1)


@settings(deadline=None)
@given(megapixels=st.integers(2, 1000), aspect=st.floats(0.5, 2))
def test_memory_is_flat_and_margins_cost_little(megapixels: int, aspect: float) -> None:
    height, width = int((megapixels * 1e6 / aspect) ** 0.5), int((megapixels * 1e6 * aspect) ** 0.5)
    assume(height * width > 7_000_000)
    plan = plan_tiles(height, width, divisor=16, radius_px=95, max_pixels=7_000_000)
    assert plan.height * plan.width <= 7_000_000
    assert plan.pixels <= 1.25 * height * width


@pytest.mark.parametrize(
    ("height", "width", "max_pixels"), [(31623, 31623, 50_000), (100, 1_000_000, 50_000), (1_000_000, 16, 1)]
)
def test_an_extreme_plan_makes_its_spans_once(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int, max_pixels: int
) -> None:
    made = []
    spans = tiling._spans
    monkeypatch.setattr(tiling, "_spans", lambda *arguments: made.append(arguments) or spans(*arguments))
    plan = plan_tiles(height, width, divisor=16, radius_px=95, max_pixels=max_pixels)
    assert len(made) == 2
    assert plan.pixels >= height * width


@given(padded=st.integers(1, 500), count=st.integers(1, 40), divisor=st.sampled_from([1, 4]), margin=st.integers(0, 20))
def test_tiles_are_counted_as_they_are_made(padded: int, count: int, divisor: int, margin: int) -> None:
    padded, margin = padded * divisor, margin * divisor
    size, tiles = tiling._tiles(padded, count, divisor, margin)
    assert len(tiling._spans(padded, padded, size, margin)) == tiles <= count
