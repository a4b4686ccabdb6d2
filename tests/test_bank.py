"""The bank feeds what its sources, seed and step decide, whoever filled it and whenever."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from deblur_deploy.errors import OutputError
from deblur_deploy.media.images import list_images
from deblur_deploy.training import bank as module
from deblur_deploy.training.bank import PIECE, Bank
from deblur_deploy.training.batches import Batch, Batches, Stages
from deblur_deploy.training.blur import BlurConfig
from deblur_deploy.training.sources import Photos
from tests.photos import write_photos

SMALL = BlurConfig(path_px=(3, 8), defocus_radius_px=(0.7, 2), gaussian_sigma_px=(0.4, 1))
STAGES: Stages = [(0, 4, 16), (30, 2, 24)]
STEPS = 36


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 2)


def bank(photographs: Path, folder: Path, *, name: str = "a", pieces: int = 3) -> Bank:
    batches = Batches([(Photos(list_images(photographs)), 1.0)], SMALL, STAGES, seed=0)
    return Bank(batches, folder, name, pieces * PIECE * 2 * 3 * 24**2)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.blurred, b.blurred) and torch.equal(a.sharp, b.sharp)


def test_any_start_and_any_filling_give_the_same(photographs: Path, tmp_path: Path) -> None:
    whole = list(bank(photographs, tmp_path / "a").load(0, STEPS, 0))
    assert [tuple(batch.sharp.shape) for batch in whole] == [(4, 3, 16, 16)] * 30 + [(2, 3, 24, 24)] * 6
    filled_elsewhere = bank(photographs, tmp_path / "b").load(0, STEPS, 1)
    assert all(same(next(filled_elsewhere), batch) for batch in whole[:7])
    filled_elsewhere.close()  # type: ignore[attr-defined]  # it is a generator
    for first in (7, 25, 33):  # not made yet, behind a renewal, in the second stage
        loaded = list(bank(photographs, tmp_path / "b").load(first, STEPS, 0))
        assert all(map(same, loaded, whole[first:]))


def test_crops_are_the_patches_turned_and_blur_goes_with_truth(photographs: Path, tmp_path: Path) -> None:
    (batch,) = bank(photographs, tmp_path).load(0, 1, 0)
    images = np.load(next(tmp_path.glob("*/images.npy")), mmap_mode="r")
    crop = np.stack([batch.blurred[0], batch.sharp[0]]).transpose(0, 2, 3, 1)
    turned = [np.rot90(crop, k, axes=(1, 2)) for k in range(4)]
    turned += [image[:, :, ::-1] for image in turned]
    side, larger = crop.shape[1], images.shape[2]
    places = [(n, y, x) for n in range(len(images)) for y in range(larger - side + 1) for x in range(larger - side + 1)]
    windows = (images[n, :, y : y + side, x : x + side] for n, y, x in places)
    assert any(any(np.array_equal(window, one) for one in turned) for window in windows)


def test_a_part_is_renewed_after_each_round(photographs: Path, tmp_path: Path) -> None:
    made = []
    for _ in bank(photographs, tmp_path).load(0, 30, 0):
        made.append(np.load(next(tmp_path.glob("*/made.npy"))).tolist())
    # 48 patches, 4 a step: a round is 12 steps, and a tenth of three pieces is rounded up to one.
    assert [made[step] for step in (0, 11, 12, 23, 24, 29)] == [[0, 1, 2]] * 2 + [[3, 1, 2]] * 2 + [[3, 4, 2]] * 2


def test_it_is_never_larger_than_the_run_needs_nor_than_allowed(photographs: Path, tmp_path: Path) -> None:
    next(bank(photographs, tmp_path / "few", pieces=10**6).load(0, 6, 0))
    assert len(np.load(next((tmp_path / "few").glob("*/images.npy")), mmap_mode="r")) == 2 * PIECE
    for name in ("a", "b"):
        next(bank(photographs, tmp_path / "two", name=name).load(0, 30, 0))
    assert len(list((tmp_path / "two").glob("*/images.npy"))) == 1


def test_two_trainings_do_not_share_a_file(photographs: Path, tmp_path: Path) -> None:
    next(bank(photographs, tmp_path).load(0, 6, 0))
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    content = (folder / "images.npy").read_bytes()
    with FileLock(folder.with_suffix(".lock")):
        next(bank(photographs, tmp_path).load(0, 6, 0))
    (other,) = (path for path in tmp_path.iterdir() if path.is_dir() and path != folder)
    assert (other / "images.npy").read_bytes() == content


def test_other_content_under_the_same_names_is_another_bank(tmp_path: Path) -> None:
    photographs = write_photos(tmp_path / "photos", 1)
    next(bank(photographs, tmp_path / "bank").load(0, 6, 0))
    next(bank(photographs, tmp_path / "bank").load(0, 6, 0))
    (before,) = (tmp_path / "bank").glob("*/")
    (path,) = list_images(photographs)
    path.write_bytes(path.read_bytes() + b"\0")
    next(bank(photographs, tmp_path / "bank").load(0, 6, 0))
    assert next(path for path in (tmp_path / "bank").iterdir() if path.is_dir()).name != before.name


def test_filling_ends_when_training_is_to_end(photographs: Path, tmp_path: Path) -> None:
    asked = bank(photographs, tmp_path)
    answers = iter([False])  # and from then on yes
    asked.stopping = lambda: next(answers, True)
    assert list(asked.load(0, STEPS, 0)) == []
    assert np.load(next(tmp_path.glob("*/made.npy"))).tolist() == [0, -1, -1]


def test_a_full_disk_is_one_line(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left on device; make room, or give less --bank-gb"):
        next(bank(photographs, tmp_path).load(0, 6, 0))
    assert not list(tmp_path.rglob("*.npy")), "a file full of holes would end the next run without a word"


def test_what_fails_while_it_is_filled_is_no_full_disk(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(module.Batches, "load_these", fails)
    with pytest.raises(OSError, match="Too many open files") as caught:
        next(bank(photographs, tmp_path).load(0, 6, 0))
    assert not isinstance(caught.value, OutputError)


def test_it_lies_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEBLUR_CACHE", str(tmp_path))
    assert module.bank_folder() == tmp_path / "bank"
