"""A batch is decided by seed, step and index, whoever makes it."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.pairs import find_pairs
from deblur_deploy.media.images import list_images
from deblur_deploy.training.batches import Batch, Batches, Stages
from deblur_deploy.training.blur import BlurConfig
from deblur_deploy.training.sources import Pairs, Photos, Source
from tests.photos import write_pairs, write_photos

STAGES: Stages = [(0, 6, 24), (3, 4, 40)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sequence[tuple[Source, float]]:
    folder = tmp_path_factory.mktemp("data")
    photos = Photos(list_images(write_photos(folder / "photos", 3)))
    return [(photos, 0.5), (Pairs(find_pairs(write_pairs(folder / "pairs", 2))), 0.5)]


def make(sources: Sequence[tuple[Source, float]], *, seed: int = 0, rank: int = 0, world: int = 1) -> Batches:
    return Batches(list(sources), BlurConfig(), STAGES, seed=seed, rank=rank, world=world)


def equal(a: Batch, b: Batch) -> bool:
    return a.names == b.names and torch.equal(a.blurred, b.blurred) and torch.equal(a.sharp, b.sharp)


def test_patches_grow_and_batches_shrink(sources: Sequence[tuple[Source, float]]) -> None:
    shapes = [tuple(batch.blurred.shape) for batch in make(sources).load(0, 5, 0)]
    assert shapes == [(6, 3, 24, 24)] * 3 + [(4, 3, 40, 40)] * 2


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_start_and_any_number_of_workers_give_the_same(
    workers: int, sources: Sequence[tuple[Source, float]]
) -> None:
    plain = [make(sources)[step] for step in range(5)]
    for first in (0, 2):
        loaded = list(make(sources).load(first, 5, workers))
        assert all(equal(a, b) for a, b in zip(loaded, plain[first:], strict=True))
    assert not equal(plain[0], make(sources, seed=1)[0])
    assert not equal(plain[0], plain[1])


def test_processes_share_the_batch_of_one(sources: Sequence[tuple[Source, float]]) -> None:
    def images(batch: Batch) -> list[bytes]:
        return [image.contiguous().numpy().tobytes() for image in batch.sharp]

    whole = make(sources)[0]
    parts = [make(sources, rank=rank, world=2)[0] for rank in (0, 1)]
    assert sorted(images(whole)) == sorted(images(parts[0]) + images(parts[1]))
    with pytest.raises(InputError, match="4 patches, which 3 processes"):
        make(sources, world=3)


def test_blur_made_later_is_the_same_blur(sources: Sequence[tuple[Source, float]]) -> None:
    here, later = make(sources), make(sources)
    later.blur_here = False
    raw = later[0]
    assert raw.plans
    assert equal(raw.finished(later.blur), here[0])


def test_unreadable_files_and_errors_travel_from_the_worker(tmp_path: Path) -> None:
    write_photos(tmp_path, 2)
    (tmp_path / "broken.jpg").write_text("no image")
    batches = Batches([(Photos(list_images(tmp_path)), 1.0)], BlurConfig(), STAGES, seed=0)
    assert set(list(batches.load(0, 3, 1))[-1].unreadable) == {str(tmp_path / "broken.jpg")}
    hopeless = Batches([(Photos([tmp_path / "broken.jpg"]), 1.0)], BlurConfig(), STAGES, seed=0)
    with pytest.raises(InputError, match=r"^1 or more training files cannot be read, first: .*broken\.jpg.*$") as kept:
        next(hopeless.load(0, 3, 1))
    assert (kept.type, active_children()) == (InputError, [])  # a loader that stayed would keep the program from ending


def test_no_data_is_said() -> None:
    with pytest.raises(InputError, match="no training data"):
        Batches([], BlurConfig(), STAGES, seed=0)
