"""Recovery learns from truth and teacher, resumes exactly, keeps the best, and says when its data are weak."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.quality import PairSet
from deblur_deploy.media.images import write_image
from deblur_deploy.pipeline.pruning.config import RecoverConfig
from deblur_deploy.pipeline.pruning.recover import Distilled, batches_for, recover, samples_for
from deblur_deploy.training.losses import LOSSES
from deblur_deploy.training.train import Progress, Trainer
from deblur_deploy.training.unet import UNet, UNetConfig
from deblur_deploy.training.validation import validate
from tests.photos import photo, write_pairs
from tests.small import unet

NARROW = UNetConfig(stem=4, encoder=((8, 8), (8,), (8, 8)), up=(8, 8), decoder=((8, 8), (8,)))


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data"), 3)


def config(pairs: Path, **more: object) -> RecoverConfig:
    tiny = RecoverConfig(data=(str(pairs),), steps=8, patches=2, side_px=32, precision="fp32", workers=0)
    return msgspec.structs.replace(tiny, **more)


def student() -> UNet:
    """Something to recover: narrow, and with a head that does harm."""
    torch.manual_seed(1)
    model = UNet(NARROW).eval()
    nn.init.normal_(model.head.weight, std=0.3)
    return model


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_it_learns_from_the_truth(pairs: Path, tmp_path: Path) -> None:
    sets, before = {"pairs": PairSet(pairs)}, weights(pupil := student())
    done = recover(pupil, unet(), config(pairs, steps=60, learning_rate=4e-3, teacher=0.0), tmp_path, sets)
    gains = [validate(model, sets)["pairs"].mean.gain_db for model in (pupil, done.unet)]
    assert gains[1] > gains[0] + 0.5
    assert (done.unet.config, done.steps) == (NARROW, 60)
    assert torch.equal(weights(pupil), before), "the pruned network itself is not touched"


def test_it_learns_from_the_teacher(pairs: Path, tmp_path: Path) -> None:
    teacher = unet()
    done = recover(student(), teacher, config(pairs, steps=60, learning_rate=4e-3, teacher=50.0), tmp_path, {})
    image = samples_for(config(pairs), tmp_path, 1)[0][0]
    with torch.no_grad():
        before, after = ((model(image) - teacher(image)).abs().mean() for model in (student(), done.unet))
    assert after < 0.8 * before


def test_features_are_compared_through_projections_that_only_training_has() -> None:
    teacher, image = unet(), torch.rand(2, 3, 35, 50)
    twin = Distilled(teacher, teacher, output=2.0, features=0.5)
    for head in twin.heads:
        nn.init.dirac_(head.weight)  # type: ignore[arg-type]
    truth = torch.rand(2, 3, 35, 50)
    images = twin(image)
    alone = LOSSES["l1"](teacher(image), truth)
    assert twin.loss(images, truth, LOSSES["l1"], 0).item() == pytest.approx(alone.item(), rel=1e-5)
    for head in twin.heads:
        nn.init.zeros_(head.weight)  # type: ignore[arg-type]
    assert twin.loss(twin(image), truth, LOSSES["l1"], 0).item() == pytest.approx(alone.item() + 0.5, rel=1e-5)
    pupil = Distilled(student(), teacher, output=1.0, features=0.5)
    pupil.loss(pupil(image), truth, LOSSES["l1"], 0).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in pupil.teacher.parameters())
    assert [head.weight.shape[:2] for head in pupil.heads] == [(12, 8), (8, 8)]
    assert all(head.weight.grad is not None for head in pupil.heads)
    assert not Distilled(student(), teacher, output=1.0, features=0.0).heads


def test_it_must_beat_the_pruned_network_on_the_same_part_of_each_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose middle alone is looked at later on, where pairs are large."""
    for kind in ("blur", "sharp"):
        (tmp_path / "wide" / kind).mkdir(parents=True)
        write_image(tmp_path / "wide" / kind / "0.png", photo(0 if kind == "sharp" else 1, 32, 1000))
    sets, seen = {"wide": PairSet(tmp_path / "wide")}, list[float]()
    monkeypatch.setattr(Trainer, "run", lambda self, *_: seen.append(self.best_gain))
    with pytest.raises(KeyboardInterrupt):
        recover(student(), unet(), config(tmp_path / "wide"), tmp_path, sets)
    whole, middle = (validate(student(), sets, side)["wide"].mean.gain_db for side in ((0, 0), (768, 512)))
    assert seen == [middle]
    assert middle != pytest.approx(whole, abs=1e-3)


def test_an_interrupted_recovery_goes_on_as_if_it_had_never_stopped(pairs: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    sets = {"pairs": PairSet(pairs)}
    whole = recover(student(), unet(), config(pairs), tmp_path / "whole", sets)
    with pytest.raises(KeyboardInterrupt):
        recover(student(), unet(), config(pairs), tmp_path / "parts", sets, interrupt)
    seen: list[int] = []
    parts = recover(student(), unet(), config(pairs), tmp_path / "parts", sets, lambda now: seen.append(now.step))
    assert seen == [4, 5, 6, 7, 8]
    assert torch.equal(weights(whole.unet), weights(parts.unet))
    again = recover(student(), unet(), config(pairs), tmp_path / "parts", sets, lambda _: pytest.fail("it was done"))
    assert torch.equal(weights(again.unet), weights(whole.unet))
    with pytest.raises(InputError, match="other data"):
        recover(student(), unet(seed=5), config(pairs), tmp_path / "parts", sets)


def test_a_recovery_that_only_harms_is_not_taken(pairs: Path, tmp_path: Path) -> None:
    pupil, sets = student(), {"pairs": PairSet(pairs)}
    done = recover(pupil, unet(), config(pairs, learning_rate=0.3), tmp_path, sets)
    assert torch.equal(weights(done.unet), weights(pupil))


def test_without_data_it_uses_the_built_in_photographs_and_knows_that_they_are_weak(
    pairs: Path, tmp_path: Path
) -> None:
    nothing = RecoverConfig()
    assert nothing.weak
    assert not config(pairs).weak
    files = [path for source in batches_for(nothing, nothing.training(1), tmp_path).sources for path in source.files()]
    assert len(files) == 5
    assert all(path.is_file() for path in files)
    (blurred, sharp), *_ = samples_for(nothing, tmp_path, 1)
    assert blurred.shape == sharp.shape == (4, 3, 128, 128)
    assert 0 <= float(blurred.min()) < float(blurred.max()) <= 1


def test_patches_are_blurred_ahead_and_shared_by_networks(pairs: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    for name, teacher in {"one": unet(), "other": unet(seed=5)}.items():
        recover(student(), teacher, config(pairs, seed=7), tmp_path / name, {}, None, lambda *now: told.append(now))
    assert told == [(16, 16)], "the second network finds what was made for the first"
    recover(student(), unet(), config(pairs, seed=8, bank_gb=0), tmp_path / "none", {}, None, pytest.fail)


def test_minutes_become_steps_once(pairs: Path, tmp_path: Path) -> None:
    short = config(pairs, minutes=0.02)
    done = recover(student(), unet(), short, tmp_path, {})
    assert done.steps == int((tmp_path / "steps.txt").read_text()) >= 1
    assert recover(student(), unet(), short, tmp_path, {}).steps == done.steps
    with pytest.raises(InputError, match="one step takes"):
        recover(student(), unet(), config(pairs, minutes=1e-9), tmp_path / "none", {})
    assert recover(student(), unet(), config(pairs, steps=0), tmp_path / "off", {}).steps == 0


@pytest.mark.parametrize(
    ("values", "said"),
    [({"steps": -1}, "steps is -1"), ({"loss": "l3"}, "loss 'l3' is unknown"),
     ({"loss": "perceptual"}, "not perceptual"),
      ({"minutes": 0.0}, "minutes is 0"), ({"side_px": 4}, "side_px is 4"),
     ({"learning_rate": 0.0}, "learning_rate is 0"), ({"teacher": -1.0}, "teacher is -1")],
)  # fmt: skip
def test_nonsense_is_named(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RecoverConfig(**values)  # type: ignore[arg-type]
