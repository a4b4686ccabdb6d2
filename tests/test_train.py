"""Training learns, stops cleanly, resumes to the last bit, and says what is wrong with its input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file

from deblur_deploy.cli.train import _only_looked_at, command, parse
from deblur_deploy.errors import DeblurError, InputError, MissingFileError, ModelError, OutputError, TrainingError
from deblur_deploy.evaluation.quality import PairSet
from deblur_deploy.media.images import list_images, read_image, write_image
from deblur_deploy.training.batches import Batches
from deblur_deploy.training.blur import BlurConfig
from deblur_deploy.training.checkpoint import load_checkpoint, save_checkpoint
from deblur_deploy.training.config import Stage, TrainConfig
from deblur_deploy.training.discovery import find_sources
from deblur_deploy.training.log import read_log
from deblur_deploy.training.losses import LOSSES
from deblur_deploy.training.supervision import Supervised
from deblur_deploy.training.train import Progress, Trainer
from deblur_deploy.training.unet import PRESETS, UNet, UNetConfig
from tests.photos import photo, write_pairs, write_photos

NET = UNetConfig(stem=2, encoder=((8,), (12,)), up=(8,), decoder=((8,),))
TINY = TrainConfig(
    steps=6,
    stages=(Stage(share=0.5, patches=4, side_px=24), Stage(share=0.5, patches=2, side_px=32)),
    precision="fp32",
    warmup_steps=1,
    workers=0,
    ema=0.8,
    log_every=1,
    validate_every=3,
)
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_photos(folder / "photos", 3)
    write_pairs(folder / "pairs", 3)
    list_images(write_pairs(folder / "broken", 2) / "blur")[0].write_text("no image")
    cut = list_images(write_pairs(folder / "cut", 2) / "sharp")[1]
    cut.write_bytes(cut.read_bytes()[:-300])
    write_image(write_pairs(folder / "small", 2) / "blur" / "0.png", photo(0, 9, 9))
    write_image(folder / "small" / "sharp" / "0.png", photo(0, 9, 9))
    torch.manual_seed(3)
    save_checkpoint(UNet(NET), folder / "init.safetensors")
    return folder


def trainer(out: Path, config: TrainConfig = TINY, **more: str) -> Trainer:
    torch.manual_seed(0)
    return Trainer(UNet(NET), config, out, **more)  # type: ignore[arg-type]


def batches(data: Path, config: TrainConfig = TINY) -> Batches:
    found = find_sources([str(data / "photos"), str(data / "pairs")], [], frames_folder=data)
    return Batches([pair for item in found for pair in item.weighted()], BlurConfig(), config.schedule(), seed=0)


def test_it_learns_and_keeps_best_and_last(data: Path, tmp_path: Path) -> None:
    config = msgspec.structs.replace(
        TINY,
        steps=80,
        stages=(Stage(share=1, patches=8, side_px=32),),
        learning_rate=2e-2,
        validate_every=40,
        log_every=10,
    )
    only_pairs = Batches([(batches(data).sources[1], 1.0)], BlurConfig(), config.schedule(), seed=0)
    quality = trainer(tmp_path, config).run(only_pairs, {"pairs": PairSet(data / "pairs")})
    assert quality["pairs"].mean.gain_db > 0.2
    rows = read_log(tmp_path / "log.csv")
    assert [int(row["step"]) for row in rows] == list(range(10, 81, 10))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[-1]["pairs_gain_db"]) == pytest.approx(quality["pairs"].mean.gain_db, abs=1e-4)
    for name in ("best", "last"):
        assert load_checkpoint(tmp_path / f"{name}.safetensors").config == NET


def interrupt_at(step: int) -> object:
    def watch(progress: Progress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return watch


def test_ctrl_c_saves_and_resuming_equals_never_having_stopped(data: Path, tmp_path: Path) -> None:
    config = msgspec.structs.replace(TINY, multi_scale=0.3)
    sets = {"pairs": PairSet(data / "pairs")}
    trainer(tmp_path / "whole", config).run(batches(data), sets)
    stopped = trainer(tmp_path / "parts", config)
    stopped.run(batches(data), sets, interrupt_at(2))  # type: ignore[arg-type]
    assert stopped.step == 3, "the step under way is finished"
    resumed = trainer(tmp_path / "parts", msgspec.structs.replace(config, save_every_s=1.0))
    resumed.load_state()
    assert resumed.step == 3
    resumed.run(batches(data), sets)
    for name in ("state", "last", "best"):
        whole, parts = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    columns = [
        [(row["step"], row["loss"]) for row in read_log(tmp_path / run / "log.csv")] for run in ("whole", "parts")
    ]
    assert columns[0] == columns[1]


def cli(*words: object, start_new_session: bool = False, **more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
    run = [sys.executable, *(("-m", "deblur_deploy.cli.train") if words[0] != "-m" else ()), *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(run, env=environment, start_new_session=start_new_session, **pipes)


def finished(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    return text


def arguments(data: Path, out: Path, *stages: str, steps: int = 12) -> list[object]:
    settings = ["--precision", "fp32", "--save-every-s", 0, "--log-every", 1, "--workers", 1, "--learning-rate", 0.01]
    settings += ["--warmup-steps", 1, "--ema", 0.8, "--steps", steps, "--multi-scale", 0.2]
    inputs = [data / "photos", f"{data / 'pairs'}=0.4"]
    return [*inputs, "--init", data / "init.safetensors", "--out", out, "--stages", *stages, *settings]


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    stages = ("0.5:4x24", "0.5:2x40")
    whole = cli(*arguments(data, tmp_path / "whole", *stages))
    killed = cli(*arguments(data, tmp_path / "killed", *stages))
    state = tmp_path / "killed" / "state.safetensors"
    while killed.poll() is None and step_of(state) < 4:
        time.sleep(0.002)
    killed.kill()
    killed.communicate()
    assert 4 <= step_of(state) < 12, "it was to be killed in the middle"
    text = finished(cli(*arguments(data, tmp_path / "killed", *stages), "--resume"))
    assert "resuming at step" in text
    finished(whole)
    for name in ("state", "last"):
        a, b = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "killed"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
        "best.safetensors", "curve.png", "last.safetensors", "log.csv", "sheet.png", "state.safetensors"
    ]  # fmt: skip


@pytest.mark.slow
def test_the_end_of_a_whole_group_is_one_line(data: Path, tmp_path: Path) -> None:
    """As service managers end it: loaders get the signal too, and may not die before the trainer has stopped."""
    endless = arguments(data, tmp_path / "run", "1:4x24", steps=100_000)
    training = cli(*endless, start_new_session=True, DEBLUR_CACHE=str(tmp_path / "cache"))
    while training.poll() is None and not list(tmp_path.glob("cache/bank/*/made.npy")):
        time.sleep(0.01)
    os.killpg(training.pid, signal.SIGTERM)
    said, _ = training.communicate(timeout=60)
    assert training.returncode == 130, said
    assert "stopped at step" in said
    assert "Error" not in said


def step_of(state: Path) -> int:
    if not state.exists():
        return 0
    with safe_open(state, framework="pt") as file:
        return int(msgspec.json.decode(file.metadata()["notes"])["step"])


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "atol"), [("adamw", 1e-4), ("muon", 5e-4)])
def test_two_processes_give_the_loss_curve_of_one(data: Path, tmp_path: Path, optimizer: str, atol: float) -> None:
    stages = ("0.5:8x24", "0.5:4x40", "--optimizer", optimizer)
    one = cli(*arguments(data, tmp_path / "one", *stages))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "deblur_deploy.cli.train")
    text = finished(cli(*launcher, *arguments(data, tmp_path / "two", *stages)))
    assert "x 2" in text
    finished(one)
    losses = [[float(row["loss"]) for row in read_log(tmp_path / run / "log.csv")] for run in ("one", "two")]
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
    for key, value in load_file(tmp_path / "one" / "last.safetensors").items():
        torch.testing.assert_close(load_file(tmp_path / "two" / "last.safetensors")[key], value, rtol=1e-3, atol=atol)


def test_a_loss_that_is_not_finite_stops_with_step_and_names(data: Path, tmp_path: Path) -> None:
    config = msgspec.structs.replace(TINY, learning_rate=1e30, save_every_s=0.0)
    run = trainer(tmp_path, config)
    with pytest.raises(TrainingError, match=r"at step 1;.*blur/0\.png"):
        run.run(batches(data, config), {})
    assert load_checkpoint(tmp_path / "last.safetensors").config == NET


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory with 4 patches of 24 px; take fewer"),
        (MemoryError(), "out of memory with 4 patches of 24 px; take fewer"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a loader process was killed"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "a loader process was killed"),
        (ZeroDivisionError("ours"), "ours"),
    ],
)
def test_what_torch_raises_within_a_step_is_one_line(
    error: Exception, said: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path)

    def step(*_: object) -> None:
        raise error

    monkeypatch.setattr(run, "_train_step", step)
    with pytest.raises(ZeroDivisionError if said == "ours" else TrainingError, match=said):
        run.run(batches(data), {})


def test_gains_on_other_pairs_say_nothing_about_these(data: Path, tmp_path: Path) -> None:
    sets = {"pairs": PairSet(data / "pairs")}
    first = trainer(tmp_path)
    first.run(batches(data), sets)
    first.best_gain = 1e3
    first.save_state()
    longer = msgspec.structs.replace(TINY, validate_px=(16, 16))
    for config, kept in ((TINY, True), (longer, False)):
        again = trainer(tmp_path, config)
        again.load_state()
        again.run(batches(data), sets)
        assert (again.best_gain == 1e3) is kept


def test_coarser_scales_are_supervised_and_never_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Supervised(UNet(NET), multi_scale=True)
    image, truth = torch.rand(2, 3, 22, 26), torch.rand(2, 3, 22, 26)
    images = network(image)
    assert [tuple(each.shape[-2:]) for each in images] == [(22, 26), (12, 14)]
    assert torch.equal(images[0], network.unet(image))
    whole = network.loss(images, truth, LOSSES["l1"], 0.5)
    finest = LOSSES["l1"](images[0], truth)
    assert whole > finest
    whole.backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in network.heads)
    save_checkpoint(network.unet, tmp_path / "net.safetensors")
    assert load_file(tmp_path / "net.safetensors").keys() == UNet(NET).state_dict().keys()


def test_a_run_is_only_resumed_with_its_own_settings_data_and_network(data: Path, tmp_path: Path) -> None:
    trainer(tmp_path, data_id="a").save_state()
    trainer(tmp_path, msgspec.structs.replace(TINY, workers=2, log_every=7), data_id="a").load_state()
    with pytest.raises(InputError, match="other settings"):
        trainer(tmp_path, msgspec.structs.replace(TINY, seed=1)).load_state()
    with pytest.raises(InputError, match="other data"):
        trainer(tmp_path, data_id="b").load_state()
    with pytest.raises(InputError, match="another network"):
        Trainer(UNet(msgspec.structs.replace(NET, stem=1)), TINY, tmp_path).load_state()
    with pytest.raises(MissingFileError, match=r"state\.safetensors"):
        trainer(tmp_path / "none").load_state()
    (tmp_path / "state.safetensors").write_bytes((tmp_path / "state.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelError, match="damaged"):
        trainer(tmp_path).load_state()


def test_bf16_trains_weights_that_stay_fp32(data: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, msgspec.structs.replace(TINY, precision="bf16", steps=2))
    run.run(batches(data), {})
    assert {value.dtype for value in run.averaged().state_dict().values()} == {torch.float32}


def words(data: Path, out: Path, *more: object) -> list[str]:
    return [*map(str, (data / "photos", "--out", out, "--steps", 2, "--stages", "1:2x24", "--workers", 0, *more))]


def test_the_command_trains_and_draws(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "photos" / "no photo.jpg").write_text("text")
    more = ("--init", data / "init.safetensors", "--val", data / "pairs", "--precision", "fp32")
    try:
        assert command(words(data, tmp_path / "run", *more)) == 0
    finally:
        (data / "photos" / "no photo.jpg").unlink()
    said = capsys.readouterr().out
    assert "1 of 4 files are no readable images and are skipped" in said
    assert "worst image" in said
    assert all(read_image(tmp_path / "run" / name).std() > 5 for name in ("curve.png", "sheet.png"))
    with pytest.raises(OutputError, match="--force"):
        command(words(data, tmp_path / "run", *more))
    assert command(words(data, tmp_path / "run", *more, "--force")) == 0


def test_a_shipped_network_goes_on_in_a_larger_one(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(words(data, tmp_path / "run", "--init", "shipped", "--grow", "quality", "--steps", "1")) == 0
    assert "network quality, grown from" in " ".join(capsys.readouterr().out.split())
    assert load_checkpoint(tmp_path / "run" / "last.safetensors").config == PRESETS["quality"]


def test_preview_is_a_sheet_of_samples_and_nothing_else(data: Path, tmp_path: Path) -> None:
    assert command(words(data, tmp_path / "run", "--preview", 5)) == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["preview.png"]
    assert _only_looked_at(tmp_path / "run"), "training may begin there"
    (tmp_path / "run" / "precious").touch()
    with pytest.raises(OutputError, match="is not empty"):
        command(words(data, tmp_path / "run"))
    sheet = read_image(tmp_path / "run" / "preview.png")
    assert sheet.shape == (3 * 24, 2 * 2 * 24, 3)


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        (("--init", "nowhere.safetensors"), MissingFileError, "nowhere"),
        (("--init", "shipped", "--grow", "article"), InputError, "same stem"),
        (("--val", "nowhere"), MissingFileError, "nowhere"),
        (("--val", "{data}/broken"), InputError, r"--val: .*broken/blur/0\.png.*; mend or remove it"),
        (("--val", "{data}/cut"), InputError, r"--val: .*cut/sharp/1\.png.*; mend or remove it"),
        (
            ("--val", "{data}/small"),
            InputError,
            r"--val: .*small/blur/0\.png has 9x9 pixels; SSIM needs 11x11 or more; mend",
        ),
        (("--frames", "nowhere"), MissingFileError, "nowhere"),
        (("--loss", "l7"), InputError, "loss 'l7' is unknown"),
        (("--loss", "perceptual=1"), InputError, "--vgg-weights"),
        (("--kernels", "nowhere.npz"), InputError, r"nowhere\.npz"),
        (("--resume",), MissingFileError, "state.safetensors"),
    ],
)
def test_a_users_mistake_is_an_error_of_one_line(
    more: tuple[str, ...], error: type[DeblurError], said: str, data: Path, tmp_path: Path
) -> None:
    more = tuple(word.format(data=data) for word in more)
    with pytest.raises(error, match=said) as caught:
        command(words(data, tmp_path / "run", "--precision", "fp32", *more))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--steps", "0"), "steps is 0"),
        (("--blur.shake", "2"), "shake is 2"),
        (("--frames-window", "8", "8"), "allowed: (fewest, most) with an odd number from 3 in it"),
        (("--resume", "--force"), "resume is given with force"),
        (("--grow", "quality"), "grow is given without init"),
        (("--stages", "0.5:3"), "SHARE:PATCHESxSIDE"),
        (("--no-such",), "no-such"),
    ],
)
def test_a_bad_command_line_says_what_is_allowed(
    more: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((InputError, SystemExit)) as caught:
        parse(["photos", "--out", str(tmp_path), *more])
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
    assert said in " ".join((capsys.readouterr().err + str(caught.value)).split())


def test_photographs_smaller_than_the_patch_are_used_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "photos" / "tiny.png", photo(0, 20, 30))
    assert command(words(tmp_path, tmp_path / "run", "--preview", 1)) == 0
    assert "1 of 1 images are smaller than the 40 px that a patch is cut from" in " ".join(
        capsys.readouterr().out.split()
    )
    assert np.ptp(read_image(tmp_path / "run" / "preview.png")) > 50
    assert list_images(tmp_path / "run")
