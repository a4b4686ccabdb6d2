"""Inputs are recognised, bad ones named, and every source draws what it promises from the generator alone."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deblur_deploy.errors import DeblurError, InputError, MissingFileError
from deblur_deploy.evaluation.pairs import find_pairs
from deblur_deploy.media.images import write_image
from deblur_deploy.training.blur import BlurConfig
from deblur_deploy.training.discovery import find_sources, inspect
from deblur_deploy.training.sources import Frames, ImageCache, Pairs, Photos, Source
from tests.photos import photo, write_pairs, write_photos


def write_video(path: Path, count: int, rate: int = 240) -> Path:
    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.qmin = stream.codec_context.qmax = 1
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * i + 20, np.uint8), format="rgb24")
            video.mux(stream.encode(frame))
        video.mux(stream.encode(None))
    return path


def write_frames(folder: Path, count: int, height: int = 40, width: int = 56) -> Path:
    """Frame i has the value 10 i; named without zeros in front, as some tools do."""
    for i in range(count):
        write_image(folder / f"frame{i}.png", np.full((height, width, 3), 10 * i, np.uint8))
    return folder


def found(inputs: list[object], frames: list[object], tmp_path: Path) -> list[tuple[str, float, int]]:
    sources = find_sources([str(i) for i in inputs], [str(f) for f in frames], frames_folder=tmp_path / "unpacked")
    return [(item.kind, item.share, sum(len(s.files()) for s in item.sources)) for item in sources]


def test_each_kind_of_input_is_recognised_and_shares_are_filled(tmp_path: Path) -> None:
    write_photos(tmp_path / "holiday" / "day1", 2)
    write_photos(tmp_path / "holiday", 1)
    write_pairs(tmp_path / "gopro" / "A", 2)
    (tmp_path / "list.csv").write_text("gopro/A/blur/0.png,gopro/A/sharp/0.png\n")
    video = write_video(tmp_path / "clip.mp4", 7)
    write_frames(tmp_path / "takes" / "1", 11)
    write_frames(tmp_path / "takes" / "2", 5)
    names = ["holiday", "gopro=0.3", "list.csv", "clip.mp4=0.2"]
    kinds = found([tmp_path / name for name in names], [f"{tmp_path / 'takes'}=0.1"], tmp_path)
    assert kinds == [
        ("photos", pytest.approx(0.2), 3),
        ("pairs", 0.3, 4),
        ("pairs", pytest.approx(0.2), 2),
        ("frames", 0.2, 7),
        ("frames", 0.1, 16),
    ]
    assert video.exists()


def test_sequences_share_by_their_length_and_sort_by_number(tmp_path: Path) -> None:
    write_frames(tmp_path / "takes" / "1", 15)
    write_frames(tmp_path / "takes" / "2", 5)
    (item,) = find_sources([], [str(tmp_path / "takes")], frames_folder=tmp_path)
    assert [share for _, share in item.weighted()] == [0.75, 0.25]
    assert [path.name for path in item.sources[0].files()] == [f"frame{i}.png" for i in range(15)]


def test_a_video_is_unpacked_once_in_order(tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", 9, rate=30)
    (item,) = find_sources([str(video)], [], frames_folder=tmp_path / "unpacked")
    files = item.sources[0].files()
    levels = [cv2.imread(str(path)).mean() for path in files]
    assert levels == pytest.approx([20 * i + 20 for i in range(9)], abs=3)
    assert "30 frames a second" in item.note
    before = [path.stat().st_mtime_ns for path in files]
    (again,) = find_sources([str(video)], [], frames_folder=tmp_path / "unpacked")
    assert [path.stat().st_mtime_ns for path in again.sources[0].files()] == before


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "no photographs in"),
        (
            lambda path: write_image(path / "x.png", photo(0)) or (path / "x.png").rename(path / "x.xyz"),
            "no photographs",
        ),
    ],
)
def test_bad_photographs_are_named(make, said: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "in")
    with pytest.raises((InputError, MissingFileError), match=said) as caught:
        find_sources([str(tmp_path / "in")], [], frames_folder=tmp_path)
    assert str(tmp_path / "in") in str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: (folder / "clip.mp4").write_bytes(b"no video"), "cannot be read as a video"),
        (lambda folder: (folder / "clip.mp4").write_bytes(b""), "cannot be read as a video"),
        (lambda folder: write_video(folder / "clip.mp4", 3), "has 3 frames"),
        (lambda folder: write_frames(folder, 4), "holds 4 frames"),
        (lambda folder: None, "no frames in"),
    ],
)
def test_bad_frames_are_named(make, said: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "in"
    folder.mkdir()
    make(folder)
    with pytest.raises(InputError, match=said):
        find_sources([], [str(folder)], frames_folder=tmp_path / "unpacked")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".clip")], "nothing is left behind"


def test_as_many_frames_are_needed_as_one_blur_takes(tmp_path: Path) -> None:
    frames = str(write_frames(tmp_path / "frames", 8))
    with pytest.raises(InputError, match="holds 8 frames; at least 9 consecutive ones are needed"):
        find_sources([], [frames], frames_folder=tmp_path, window=(8, 31))
    find_sources([], [], [frames], frames_folder=tmp_path, window=(8, 31))  # flow needs two


@pytest.mark.parametrize(
    ("inputs", "said"),
    [([], "no training data"), (["a=0"], "share is 0"), (["a=1", "b"], "nothing is left"), (["a=nan"], "share is nan")],
)
def test_bad_shares_are_named(inputs: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        find_sources(inputs, [], frames_folder=tmp_path)


def test_a_name_with_an_equals_sign_is_a_name(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "iso=400", 1)
    assert found([folder], [], tmp_path) == [("photos", 1.0, 1)]
    assert found([f"{folder}=0.5"], [], tmp_path) == [("photos", 0.5, 1)]


def test_inspection_counts_small_and_unreadable_files_and_names_unequal_pairs(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 2, 96, 128)
    (tmp_path / "in" / "bad.jpg").write_text("no image")
    source = Photos(sorted((tmp_path / "in").iterdir()))
    assert inspect([source], 96, 0).small == ()
    seen = inspect([source], 96, 4)
    assert (seen.files, len(seen.small), [path.name for path in seen.unreadable]) == (3, 2, ["bad.jpg"])
    with pytest.raises(InputError, match="none of 1 files"):
        inspect([Photos([tmp_path / "in" / "bad.jpg"])], 96, 0)
    write_pairs(tmp_path / "pairs", 2)
    write_image(tmp_path / "pairs" / "sharp" / "1.png", photo(1, 20, 30))
    with pytest.raises(InputError, match=r"blur/1\.png has 80x64 pixels .*30x20"):
        inspect([Pairs(find_pairs(tmp_path / "pairs"))], 32, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 80), st.integers(0, 16), st.integers(0, 2**32 - 1))
def test_a_patch_has_the_size_that_was_asked_for(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, side: int, margin: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    write_pairs(folder, 1, height, width)
    pair = find_pairs(folder)
    sources: list[tuple[Source, int]] = [
        (Photos([pair[0][1]]), side + 2 * margin),
        (Pairs(pair), side),
        (Frames([pair[0][1]] * 5), side),
    ]
    for source, expected in sources:
        patch, again = (source.draw(np.random.default_rng(seed), side, margin) for _ in range(2))
        assert patch.sharp.shape == (expected, expected, 3)
        assert patch.sharp.dtype == np.uint8
        assert np.array_equal(patch.sharp, again.sharp)
        if patch.blurred is not None:
            assert patch.blurred.shape == patch.sharp.shape
    assert np.array_equal(patch.sharp, patch.blurred), "equal frames average to themselves"


def test_pairs_stay_aligned_through_crop_and_turn(tmp_path: Path) -> None:
    write_image(tmp_path / "blur" / "a.png", photo(0) // 2)
    write_image(tmp_path / "sharp" / "a.png", photo(0))
    source = Pairs(find_pairs(tmp_path), varied=0)
    for seed in range(12):
        patch = source.draw(np.random.default_rng(seed), 40, 0)
        assert patch.blurred is not None
        assert np.array_equal(patch.blurred, patch.sharp // 2)


def test_scale_and_colours_of_pairs_vary_in_both_images_alike(tmp_path: Path) -> None:
    ramp = np.zeros((60, 60, 3), np.uint8)
    ramp[..., 0] = 4 * np.arange(60)
    for name in ("blur", "sharp"):
        write_image(tmp_path / name / "a.png", ramp)
    source, places, slopes = Pairs(find_pairs(tmp_path), varied=1), set[int](), []
    for seed in range(30):
        patch = source.draw(np.random.default_rng(seed), 20, 0)
        assert np.array_equal(patch.blurred, patch.sharp)
        (place,) = np.flatnonzero(patch.sharp.any((0, 1)))
        places.add(int(place))
        slopes.append(float(np.ptp(patch.sharp[..., place].astype(float))) / 19)
    assert places == {0, 1, 2}
    # Steeper by as much as it was made smaller, flatter by as much as the colour was dimmed.
    assert 1.9 < min(slopes) < 3
    assert 5 < max(slopes) < 8.1


@pytest.mark.parametrize("gamma", [1.0, 2.2])
def test_frames_average_light_around_their_middle(gamma: float, tmp_path: Path) -> None:
    paths = [write_frames(tmp_path, 15) / f"frame{i}.png" for i in range(15)]
    for seed in range(20):
        patch = Frames(paths, blur=BlurConfig(gamma=gamma, flatter=0, undecoded=0), varied=0).draw(
            np.random.default_rng(seed), 8, 0
        )
        middle = int(patch.sharp[0, 0, 0]) // 10
        assert patch.blurred is not None
        means = {
            half: round(
                255 * np.mean([(10 * i / 255) ** gamma for i in range(middle - half, middle + half + 1)]) ** (1 / gamma)
            )
            for half in (2, 3, 4, 5, 6, 7)
            if half <= middle < 15 - half
        }
        assert int(patch.blurred[0, 0, 0]) in means.values()


def test_one_bad_frame_leaves_the_windows_on_either_side(tmp_path: Path) -> None:
    paths = [write_frames(tmp_path, 15) / f"frame{i}.png" for i in range(15)]
    paths[7].write_text("no image")
    source = Frames(paths, window=(5, 15))
    names = {Path(source.draw(np.random.default_rng(seed), 8, 0).name).stem for seed in range(40)}
    assert names == {f"frame{i}" for i in (2, 3, 4, 10, 11, 12)}


def test_frames_of_two_sizes_are_named_before_training(tmp_path: Path) -> None:
    folder = write_frames(tmp_path, 5)
    write_image(folder / "frame3.png", photo(0, 20, 30))
    with pytest.raises(InputError, match=r"56x40 pixels but .*frame3\.png 30x20; one folder is one sequence"):
        inspect([Frames(sorted(folder.iterdir()))], 16, 0)


def test_unreadable_files_are_replaced_the_same_way_each_time(tmp_path: Path) -> None:
    write_photos(tmp_path, 3)
    (tmp_path / "photo1.png").write_bytes((tmp_path / "photo1.png").read_bytes()[:200])
    (tmp_path / "photo3.jpg").write_text("no image")
    paths = sorted(tmp_path.iterdir())
    first, second = Photos(paths), Photos(paths)
    draws = [first.draw(np.random.default_rng(seed), 32, 0) for seed in range(20)]
    assert {Path(patch.name).name for patch in draws} == {"photo0.png", "photo2.png"}
    assert {path.name for path in first.cache.unreadable} == {"photo1.png", "photo3.jpg"}
    for seed in reversed(range(20)):  # another order, another cache
        assert np.array_equal(second.draw(np.random.default_rng(seed), 32, 0).sharp, draws[seed].sharp)


def test_when_nothing_can_be_read_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(DeblurError, match=r"cannot be read, first: .*a\.jpg"):
        Photos([tmp_path / "a.jpg"]).draw(np.random.default_rng(0), 32, 0)


def test_the_cache_keeps_to_its_budget(tmp_path: Path) -> None:
    paths = sorted(write_photos(tmp_path, 4, 10, 10).iterdir())
    cache = ImageCache(budget_bytes=700)
    first = [cache[path] for path in paths]
    again = [cache[path] for path in paths]
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True, False, False]
    assert cache.budget_bytes >= 0
