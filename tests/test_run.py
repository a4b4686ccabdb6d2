"""deblur-run, called as the console script calls it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from deblur_deploy.cli import common, run
from deblur_deploy.cli.run_config import RunConfig
from deblur_deploy.media import images
from tests import tiny
from tests.conftest import noise


def deblur_run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["deblur-run", *map(str, arguments)])
    return run.main()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for i, name in enumerate(("a.jpg", "b.png", "sub/c.tif")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        images.write_image(folder / name, noise(20 + i, 30, 3))
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_and_only_what_is_new(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photos: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = photos, "--out", out, "--model", bundle, "--provider", "cpu"
    assert deblur_run(monkeypatch, *arguments) == common.OK
    assert files(out) == ["a.jpg", "b.png"]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert deblur_run(monkeypatch, *arguments, "--recursive") == common.OK
    assert files(out) == ["a.jpg", "b.png", "sub/c.tif"]
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert "1 restored" in (said := capsys.readouterr().err)
    assert "2 were there already (--overwrite does them again, as with another --model), 0 failed" in said
    assert deblur_run(monkeypatch, *arguments, "--glob", "a*", "--overwrite") == common.OK
    assert (out / "a.jpg").stat().st_mtime_ns > before[out / "a.jpg"]


def test_a_folder_tells_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photos: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "a.jpg").rename(photos / "a.jfif")
    for name in ("x.txt", "y.txt", "z.heic", ".hidden"):
        (photos / name).touch()
    out = tmp_path / "out [/2] [final]"
    arguments = photos, "--out", out, "--model", bundle, "--provider", "cpu"
    assert deblur_run(monkeypatch, *arguments) == common.OK
    assert files(out) == ["a.jfif", "b.png"]
    said = capsys.readouterr().err
    assert "left out: 2 .txt, 1 " in said
    assert f"2 restored to {out}, 0 were there already, 0 failed\n" in said
    assert deblur_run(monkeypatch, *arguments) == common.OK
    assert f"nothing to do: all 2 were in {out} already; --overwrite" in capsys.readouterr().err


def test_what_a_result_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photos: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (photos / "a.jpg").open("ab") as file:
        file.write(b"\0\0\0\x18ftypmp42")
    (photos / "c.jpg").write_bytes((photos / "b.png").read_bytes())
    out = tmp_path / "out"
    assert deblur_run(monkeypatch, photos, "--out", out, "--model", bundle) == common.SOME_FAILED
    said = capsys.readouterr().err
    assert f"deblur-run: {photos / 'a.jpg'} is restored without the video in it\n" in said
    assert f"deblur-run: note: {photos / 'c.jpg'} is a PNG inside, and so is its result\n" in said
    assert "3 restored (1 of them incomplete) to" in said
    assert (out / "c.jpg").read_bytes() == (out / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("read_bytes", OSError(5, "Input/output error")),
        ("read_bytes", MemoryError()),
        ("write_bytes", OSError(28, "No space left on device")),
        ("stat", PermissionError(13, "Permission denied")),
    ],
)
def test_a_file_that_fails_ends_no_other(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    photos: Path,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    error: Exception,
) -> None:
    images.write_image(photos / "aa.png", noise(9, 9, 3))
    good = getattr(Path, method)

    def failing(path: Path, *arguments: object, **options: object) -> object:
        if path.name.lstrip(".").startswith("aa"):
            raise error
        return good(path, *arguments, **options)

    monkeypatch.setattr(Path, method, failing)
    assert deblur_run(monkeypatch, photos, "--out", tmp_path / "out", "--model", bundle) == common.SOME_FAILED
    monkeypatch.undo()
    assert files(tmp_path / "out") == ["a.jpg", "b.png"]
    assert "aa.png" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no such permissions")
@pytest.mark.parametrize(
    ("locked", "arguments"),
    [
        ("photos", ["photos"]),
        ("photos", ["photos/a.jpg"]),
        ("out", ["photos"]),
        ("tiny", ["photos"]),
        ("tiny/bundle.json", ["photos"]),
        ("tiny/int8.onnx", ["photos"]),
    ],
)
def test_what_is_locked_is_one_line(tmp_path: Path, photos: Path, locked: str, arguments: list[str]) -> None:
    (tmp_path / "out").mkdir()
    tiny.write_bundle(tmp_path / "tiny")
    command = [sys.executable, "-m", "deblur_deploy.cli.run", *arguments, "--out", "out", "--model", "tiny"]
    if os.geteuid() == 0:  # for whom nothing is locked, but for these
        if not shutil.which("setpriv"):
            pytest.skip("runs as root, without setpriv")
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
    mode = (tmp_path / locked).stat().st_mode
    (tmp_path / locked).chmod(0)
    done = subprocess.run([*command, "--provider", "cpu"], capture_output=True, text=True, cwd=tmp_path)
    (tmp_path / locked).chmod(mode)
    assert (done.returncode, done.stderr.count("\n")) == (common.USER_ERROR, 1), done.stderr
    assert done.stderr.startswith("deblur-run: cannot ")
    assert locked.partition("/")[0] in done.stderr
    assert "Permission denied" in done.stderr


def test_the_pixels_are_the_engines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photos: Path, bundle: Path
) -> None:
    from deblur_deploy import DeblurEngine

    assert deblur_run(monkeypatch, photos / "b.png", "--out", tmp_path, "--model", bundle) == common.OK
    expected = DeblurEngine(bundle)(images.read_image(photos / "b.png"))
    np.testing.assert_array_equal(images.read_image(tmp_path / "b.png"), expected)


def test_a_corrupt_image_among_good_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photos: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "aa.jpg").write_bytes((photos / "a.jpg").read_bytes()[:300])
    assert deblur_run(monkeypatch, photos, "--out", tmp_path / "out", "--model", bundle) == common.SOME_FAILED
    assert files(tmp_path / "out") == ["a.jpg", "b.png"]
    assert "aa.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{photos}", "--provider", "gpu9"], "gpu9"),
        (["{photos}", "--provider", "tensorrt"], "tensorrt"),
        (["{photos}", "--precision", "bf16", "--provider", "cpu"], "bf16"),
        (["{photos}/empty"], "no images or videos"),
        (["{photos}/absent.jpg"], "absent.jpg"),
        (["{photos}/text.txt"], "text.txt"),
        (["{photos}/" + 300 * "x" + ".png"], "File name too long"),
        (["{photos}", "--glob", "sub/*"], "glob is 'sub/*'"),
        (["{photos}", "--model", "{photos}/text.onnx"], "text.onnx is not an ONNX model"),
        (["{photos}", "--model", "{photos}/stranger.onnx"], "no deblur_deploy contract"),
        (["{photos}", "--model", "{photos}"], "bundle.json"),
        (["{photos}", "--out", "{photos}"], "overwritten by its own result"),
        (["{photos}/a.jpg", "{photos}/empty/../sub/../a2/a.jpg"], "would both be written"),
        ([], "give images"),
        (["{photos}", "--glob", ""], "glob is ''"),
        (["{photos}", "--glob", "/a*"], "glob is '/a*'"),
        (["{photos}", "--glob", "../*"], "glob is '../*'"),
        (["{photos}", "--out", "{photos}/text.txt/x"], "text.txt is a file"),
    ],
)
def test_a_users_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    photos: Path,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    (photos / "empty").mkdir()
    (photos / "a2").mkdir()
    images.write_image(photos / "a2" / "a.jpg", noise(5, 5, 3))
    for name in ("text.txt", "text.onnx"):
        (photos / name).write_text("hello")
    tiny.write_model(photos / "stranger.onnx", contract=False)
    given = [argument.format(photos=photos) for argument in arguments]
    given += [] if "--model" in given else ["--model", str(bundle)]
    given += [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert deblur_run(monkeypatch, *given) == common.USER_ERROR
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("deblur-run: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes with names")
def test_a_pipe_is_called_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "p.png")
    assert deblur_run(monkeypatch, tmp_path / "p.png", "--out", tmp_path / "out") == common.USER_ERROR
    assert capsys.readouterr().err == f"deblur-run: {tmp_path / 'p.png'} is a pipe, a file is needed\n"


def test_a_gray_png_with_16_bits_stays_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images.write_photo(tmp_path / "a.png", images.Photo(pixels=noise(9, 9).astype(np.uint16) * 257))
    assert deblur_run(monkeypatch, tmp_path / "a.png", "--out", tmp_path / "out", "--model", bundle) == common.OK
    restored = cv2.imread(str(tmp_path / "out" / "a.png"), cv2.IMREAD_UNCHANGED)
    assert (restored.dtype, restored.shape) == (np.uint16, (9, 9))
    assert "more than 8 bits: tiny/float on" in capsys.readouterr().err


def test_the_doctor_tells_what_runs(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deblur_run(monkeypatch, "--doctor", "--model", bundle) == common.OK
    shown = capsys.readouterr().out
    for word in ("processor", "onnxruntime", "cpu", "cuda", "openvino", "tiny/int8 on"):
        assert word in shown


def test_the_doctor_mends_a_missing_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deblur_run(monkeypatch, "--doctor", "--model", tmp_path / "none") == common.SOME_FAILED
    assert "-> deblur-export" in capsys.readouterr().out


def started(*arguments: object, until: Callable[[], bool]) -> tuple[list[str], subprocess.Popen[str]]:
    """A deblur-run of its own process, which has come as far as ``until``."""
    command = [sys.executable, "-m", "deblur_deploy.cli.run", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not until() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    return command, process


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_ended_it_leaves_no_half_file_and_goes_on(tmp_path: Path, bundle: Path, number: int, status: int) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    for i in range(200):
        images.write_image(photos / f"{i:03}.png", noise(160, 160, 3, seed=i))
    arguments = photos, "--out", out, "--model", bundle
    command, process = started(*arguments, until=lambda: out.is_dir() and any(out.glob("[0-9]*.png")))
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == status
    assert "Traceback" not in said
    finished = sorted(out.glob("[0-9]*.png"))
    assert finished
    for path in finished:
        assert images.read_image(path).shape == (160, 160, 3)
    before = {path: path.stat().st_mtime_ns for path in finished}
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == common.OK
    assert files(out) == [f"{i:03}.png" for i in range(200)]
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_killed_in_a_video_it_leaves_no_half_one(tmp_path: Path, bundle: Path) -> None:
    pytest.importorskip("av")
    from tests.test_video import facts

    source, out = tmp_path / "a.mkv", tmp_path / "out"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter_fourcc(*"MJPG"), 25, (320, 240))
    for i in range(120):
        writer.write(noise(240, 320, 3, seed=i))
    writer.release()

    def writing() -> bool:
        return out.is_dir() and any(path.stat().st_size for path in out.glob(".a-*"))

    command, process = started(source, "--out", out, "--model", bundle, until=writing)
    process.kill()
    process.communicate()
    assert [path for path in files(out) if not path.startswith(".")] == []
    assert len(files(out)) == 1
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == common.OK
    assert files(out) == ["a.mkv"]
    assert len(facts(out / "a.mkv")["times"]) == 120


@pytest.mark.parametrize(
    ("out", "sources"), [("{photos}/../x", 2), ("{photos}/..", 2), ("{photos}/../..", 2), ("{photos}/sub", 2)]
)
def test_only_a_result_folder_inside_is_left_out(photos: Path, out: str, sources: int) -> None:
    config = RunConfig(inputs=(photos,), out=Path(out.format(photos=photos)), recursive="sub" in out)
    assert len(run.plan_jobs(config).jobs) == sources


def test_nothing_to_do_needs_no_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.jpg", "b.png"):
        images.write_image(tmp_path / "out" / name, noise(5, 5, 3))
    assert deblur_run(monkeypatch, photos, "--out", tmp_path / "out", "--model", tmp_path / "none") == common.OK
    said = capsys.readouterr().err
    assert "nothing to do: all 2" in said
    assert "already; --overwrite does them again, as with another --model" in said


def test_leftovers_of_a_killed_run_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Path, photos: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in (".a-deblur-abc_1234.jpg", ".c-deblur-abc_1234.jpg", ".a-deblur-ABCDEFGH.jpg"):
        (out / name).touch()
    assert deblur_run(monkeypatch, photos / "a.jpg", "--out", out, "--model", bundle) == common.OK
    assert files(out) == [".a-deblur-ABCDEFGH.jpg", ".c-deblur-abc_1234.jpg", "a.jpg"]


@pytest.mark.parametrize("option", ["--max-megapixels", "--max-memory-mb"])
@pytest.mark.parametrize("value", ["inf", "nan", "0"])
def test_limits_are_finite(
    monkeypatch: pytest.MonkeyPatch, photos: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deblur_run(monkeypatch, photos, option, value) == common.USER_ERROR
    assert option[2:] in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line(
    monkeypatch: pytest.MonkeyPatch, photos: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deblur_run(monkeypatch, photos, "--out", "/proc/none", "--model", bundle) == common.USER_ERROR
    assert "cannot write to /proc/none: " in capsys.readouterr().err
