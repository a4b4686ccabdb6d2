"""Commands that are killed with -9 at random moments, over and over, until they have done their work all the same.

After each kill every file with a name of its own must be whole.  Every few kills, and at the end, the command is left
alone: it must come to its end, leave nothing of the killed ones behind, and give what a run that was never disturbed
gave.  What is counted: crashes (it ends by itself with an error), hangs, tracebacks, half files and silent losses (it
says that all is well, and something is missing or differs).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ALONE_EVERY = 5
"""Kills between two runs that are left alone."""

Digest = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command line, and how to look at what it made."""

    name: str
    prepare: Callable[[Path], None]
    """Writes the inputs into an empty folder."""
    arguments: Callable[[Path], list[str]]
    """The command line's, for a first run or one that goes on."""
    digest: Callable[[Path], Digest]
    """What is in OUT, by name: raises for a file that is not whole."""


@dataclass
class Result:
    """What came of one command."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    undisturbed_s: float = 0.0

    def failed(self, kind: str, what: str) -> None:
        self.outcomes[kind] += 1
        self.failures.append(f"{kind}: {what}"[:500])

    def record(self) -> dict[str, Any]:
        counts = {kind: self.outcomes[kind] for kind in KINDS_OF_FAILURE}
        undisturbed = round(self.undisturbed_s, 2)
        return {**self.outcomes, **counts, "undisturbed_s": undisturbed, "failures": self.failures[:20]}


KINDS_OF_FAILURE = ("crashes", "hangs", "tracebacks", "half files", "silent losses")


def kill(name: str, count: int, seed: int = 0) -> Result:
    """Kill the command ``count`` times; everything happens in a temporary folder."""
    command, random_, result = COMMANDS[name], random.Random(seed), Result()
    with tempfile.TemporaryDirectory(prefix="deblur-kills-") as place:
        room = Path(place)
        command.prepare(room)
        start = time.monotonic()
        _alone(command, room, None, result, limit_s=3600)
        result.undisturbed_s = time.monotonic() - start
        if result.failures:
            return result
        whole = command.digest(room / "out")
        _wipe(room)
        while result.outcomes["killed"] < count and len(result.failures) < 50:
            if _killed(command, room, random_.uniform(0, 1.05 * result.undisturbed_s), result):
                result.outcomes["killed"] += 1
                _look(command, room, result)
                if result.outcomes["killed"] % ALONE_EVERY and result.outcomes["killed"] < count:
                    continue
            else:
                result.outcomes["finished before the kill"] += 1
            _alone(command, room, whole, result, limit_s=120 + 10 * result.undisturbed_s)
            result.outcomes["left alone"] += 1
            _wipe(room)
    return result


def _status(command: Command, room: Path, limit_s: float) -> int | None:
    """The command's exit status; None if it was still running after that time, and was killed with all it started."""
    code = f"import sys; from deblur_deploy.cli.entry import {command.name} as main; sys.exit(main())"
    with (room / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *command.arguments(room)],
            stdout=log,
            stderr=log,
            cwd=room,
            env={**os.environ, "DEBLUR_CACHE": str(room / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def _killed(command: Command, room: Path, after_s: float, result: Result) -> bool:
    """Whether it was still running after that time, and was killed."""
    status = _status(command, room, after_s)
    if status:
        _crashed(status, room, result)
    return status is None


def _alone(command: Command, room: Path, whole: Digest | None, result: Result, *, limit_s: float) -> None:
    status = _status(command, room, limit_s)
    if status is None:
        result.failed("hangs", f"no end after {limit_s:.0f} s")
        return
    if status:
        _crashed(status, room, result)
        return
    _look(command, room, result)
    left = [str(path.relative_to(room)) for path in room.rglob(".*") if "cache" not in path.parts]
    if left:
        result.failed("half files", f"left behind: {left[:5]}")
    try:
        found = command.digest(room / "out")
    except Exception as error:  # whatever reads a file that is not whole
        result.failed("silent losses", f"it ended well, but: {error!r}")
        return
    if whole is not None and found != whole:
        differing = sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))
        result.failed("silent losses", f"it ended well, but these are missing or differ: {differing[:5]}")


def _crashed(status: int, room: Path, result: Result) -> None:
    said = (room / "log").read_text(errors="replace")
    kind = "tracebacks" if "Traceback" in said else "crashes"
    result.failed(kind, f"ended with {status}: {said.strip()[-300:]}")


def _look(command: Command, room: Path, result: Result) -> None:
    """What has its own name is whole, at any moment."""
    if not (room / "out").exists():
        return
    try:
        command.digest(room / "out")
    except Exception as error:  # whatever reads a file that is not whole
        result.failed("half files", repr(error))


def _wipe(room: Path) -> None:
    for name in ("out", "cache"):
        shutil.rmtree(room / name, ignore_errors=True)
    for path in room.glob(".*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _files(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*") if path.is_file() and not path.name.startswith("."))


def _of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _prepare_run(room: Path) -> None:
    import cv2

    from tests import tiny

    tiny.write_bundle(room / "bundle")
    (room / "photos").mkdir()
    random_ = np.random.default_rng(0)
    for number in range(40):
        noise = random_.integers(0, 256, (160, 200, 3), np.uint8)
        cv2.imwrite(str(room / "photos" / f"{number:03}{('.png', '.jpg', '.tif')[number % 3]}"), noise)
    writer = cv2.VideoWriter(str(room / "photos" / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (160, 128))
    for _ in range(60):
        writer.write(random_.integers(0, 256, (128, 160, 3), np.uint8))
    writer.release()


def _run(_: Path) -> list[str]:
    return ["photos", "--out", "out", "--model", "bundle", "--provider", "cpu"]


def _digest_run(out: Path) -> Digest:
    import av

    from deblur_deploy.media.images import read_photo

    found = {}
    for path in _files(out):
        if path.suffix == ".avi":
            with av.open(str(path)) as film:
                frames = [frame.to_ndarray(format="rgb24").tobytes() for frame in film.decode(video=0)]
            if len(frames) != 60:
                raise ValueError(f"{path.name} has {len(frames)} of 60 frames")
            found[path.name] = _of(b"".join(frames))
        else:
            found[path.name] = _of(read_photo(path).pixels.tobytes())
    return found


def _prepare_export(room: Path) -> None:
    import cv2
    import msgspec

    from deblur_deploy.media.images import write_image
    from deblur_deploy.pipeline.recipe import write_recipe
    from deblur_deploy.training.checkpoint import save_checkpoint
    from tests.photos import photo
    from tests.small import RECIPE, unet

    save_checkpoint(unet("flat"), room / "net.safetensors")
    for seed in range(2):
        for kind in ("blur", "calibration"):
            write_image(room / kind / f"{seed}.png", cv2.GaussianBlur(photo(seed), (0, 0), 1.2))
        write_image(room / "sharp" / f"{seed}.png", photo(seed))
    recipe = msgspec.structs.replace(RECIPE, pairs=room, calibration=room / "calibration")
    write_recipe(recipe, room / "recipe.toml")


def _export(_: Path) -> list[str]:
    # A kill that came just after the bundle was in place leaves it there, whole.
    return ["net.safetensors", "--out", "out", "--recipe-file", "recipe.toml", "--json", "--force"]


def _digest_export(out: Path) -> Digest:
    from deblur_deploy import DeblurEngine
    from deblur_deploy.files import sha256

    manifest = json.loads((out / "bundle.json").read_text())
    DeblurEngine(out, "cpu").close()
    for name in ("report.html", "README.md", "recipe.toml"):
        if not (out / name).stat().st_size:
            raise ValueError(f"{name} is empty")
    found = {row["file"]: sha256(out / row["file"]) for row in manifest["variants"]}
    if wrong := [row["file"] for row in manifest["variants"] if found[row["file"]] != row["sha256"]]:
        raise ValueError(f"{wrong} are not what the manifest says")
    return found


def _prepare_train(room: Path) -> None:
    from deblur_deploy.training.checkpoint import save_checkpoint
    from tests.photos import write_pairs, write_photos
    from tests.small import unet

    write_photos(room / "photos", 3)
    write_pairs(room / "pairs", 2)
    save_checkpoint(unet("stem2"), room / "net.safetensors")


def _train(room: Path) -> list[str]:
    going_on = ["--resume"] if (room / "out" / "state.safetensors").exists() else ["--force"]
    options = {
        "--out": "out",
        "--init": "net.safetensors",
        "--val": "pairs",
        "--steps": "120",
        "--stages": "1:4x32",
        "--warmup-steps": "5",
        "--workers": "0",
        "--precision": "fp32",
        "--log-every": "10",
        "--validate-every": "40",
        "--save-every-s": "0.1",
    }
    return ["photos", "pairs", *going_on, *(word for item in options.items() for word in item)]


def _digest_train(out: Path) -> Digest:
    import cv2
    from safetensors.numpy import load_file

    from deblur_deploy.training.checkpoint import load_checkpoint
    from deblur_deploy.training.log import read_log

    found = {}
    for path in _files(out):
        if path.suffix == ".safetensors":
            if path.stem != "state":
                load_checkpoint(path)
            found[path.name] = _of(b"".join(value.tobytes() for _, value in sorted(load_file(path).items())))
        elif path.name == "log.csv":
            found[path.name] = " ".join(row["step"] for row in read_log(path))
        elif cv2.imread(str(path)) is None:
            raise ValueError(f"{path.name} is no image")
    return found


COMMANDS = {
    "run": Command(name="run", prepare=_prepare_run, arguments=_run, digest=_digest_run),
    "export": Command(name="export", prepare=_prepare_export, arguments=_export, digest=_digest_export),
    "train": Command(name="train", prepare=_prepare_train, arguments=_train, digest=_digest_train),
}
