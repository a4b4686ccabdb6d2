"""Many machines: the files are deblur-run's to the byte, and a lost worker costs only what it had in hand."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from deblur_deploy import DeblurEngine
from deblur_deploy.cli import cluster, common
from deblur_deploy.cli.arguments import parse_arguments
from deblur_deploy.cli.run_config import RunConfig
from deblur_deploy.cluster import places
from deblur_deploy.cluster.work import Settings, Task, Worker, connected, packed, pool, restore
from deblur_deploy.errors import DeblurError, InputError, MissingFileError, ProviderError
from deblur_deploy.media import images
from tests.conftest import noise
from tests.test_run import deblur_run, files

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="ray is not installed; pip install 'deblur-deploy[ray]'"
)
# Ray's own, at import and at the end of its processes.
quiet = pytest.mark.filterwarnings("default")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for i, name in enumerate(("a.jpg", "b.png", "sub/c.tif")):
        images.write_image(folder / name, noise(20 + i, 30, 3))
    images.write_photo(folder / "deep.png", images.Photo(pixels=noise(9, 9).astype(np.uint16) * 257))
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    return folder


@needs_ray
@quiet
@pytest.mark.slow
def test_the_files_are_plain_deblur_runs(monkeypatch, tmp_path: Path, photos: Path, bundle: Path, capsys) -> None:
    arguments = photos, "--recursive", "--model", bundle, "--provider", "cpu"
    assert deblur_run(monkeypatch, *arguments, "--out", tmp_path / "plain") == common.SOME_FAILED
    command = [sys.executable, "-m", "deblur_deploy.cli.run", *arguments, "--out", tmp_path / "out", "--ray"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == common.SOME_FAILED, done.stderr
    assert f"deblur-run: {photos}/broken.jpg is not a JPEG image that can be read" in done.stderr
    assert "4 restored" in done.stderr
    said = [line for line in done.stderr.splitlines() if "RAY_BACKEND_LOG_LEVEL" not in line]
    assert len(said) == 3, done.stderr  # that, the bar, and the failed one: nothing of Ray's own
    assert files(tmp_path / "out") == files(tmp_path / "plain") == ["a.jpg", "b.png", "deep.png", "sub/c.tif"]
    for name in files(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    capsys.readouterr()
    (photos / "broken.jpg").unlink()
    # What is finished is skipped, and needs no cluster.
    assert deblur_run(monkeypatch, *arguments, "--out", tmp_path / "out", "--ray", "127.0.0.1:1") == common.OK
    assert "nothing to do: all 4" in capsys.readouterr().err


@needs_ray
@quiet
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_a_killed_worker_costs_only_what_it_had_in_hand(tmp_path: Path, bundle: Path) -> None:
    out, tasks = tmp_path / "out", []
    for i in range(48):
        source = tmp_path / "photos" / f"{i:02}.png"
        images.write_image(source, noise(160, 160, 3, seed=i))
        tasks.append(Task(source=str(source), target=str(out / source.name)))
    settings = Settings(model=packed(bundle), provider="cpu", threads=1)
    outcomes, before = [], {}
    with connected():
        for outcome in restore(tasks, settings):
            if not outcomes:
                os.kill(int(outcome.worker.rpartition(":")[2]), signal.SIGKILL)
                before = {path: path.stat().st_mtime_ns for path in out.glob("[0-9]*.png")}
            outcomes.append(outcome)
        with pytest.raises(ProviderError, match=r"worker .*:\d+ cannot restore: .*cuda"):
            list(restore([Task(source="a", target="b")], Settings(model=None, provider="cuda")))
    assert sorted(outcome.target for outcome in outcomes) == [task.target for task in tasks]
    assert {outcome.error for outcome in outcomes} == {""}
    assert before
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    engine = DeblurEngine(bundle, "cpu")
    for task in tasks:
        np.testing.assert_array_equal(
            images.read_image(Path(task.target)), engine(images.read_image(Path(task.source)))
        )


def outcomes(worker: Worker, *tasks: tuple[object, object]) -> list[str]:
    batch = {"source": np.array([str(a) for a, _ in tasks]), "target": np.array([str(b) for _, b in tasks])}
    return list(worker(batch)["error"])


@pytest.fixture
def worker(bundle: Path) -> Worker:
    return Worker(Settings(model=packed(bundle), provider="cpu", max_pixels=1000))


def test_a_worker_goes_on_after_bad_images(worker: Worker, tmp_path: Path) -> None:
    good, large, out = tmp_path / "good.png", tmp_path / "large.png", tmp_path / "out.png"
    images.write_image(good, noise(20, 30, 3))
    images.write_image(large, noise(200, 30, 3))
    said = outcomes(worker, (tmp_path / "none.png", out), (large, out), (good, out), (good, tmp_path / "x.gif"))
    assert "no such file" in said[0]
    assert "30x200 pixels" in said[1]
    assert said[2:] == ["", ""]
    # The content decides what is written, as in deblur-run.
    assert (tmp_path / "x.gif").read_bytes() == out.read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_a_full_disk_fails_that_image_and_leaves_nothing(worker: Worker, tmp_path: Path) -> None:
    images.write_image(tmp_path / "a.png", noise(20, 30, 3))
    images.write_image(tmp_path / "b.png", noise(2, 3, 3))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        said = outcomes(worker, *((tmp_path / name, tmp_path / "out" / name) for name in ("a.png", "b.png")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "nothing was left behind" in said[0]
    assert said[1] == ""
    assert files(tmp_path / "out") == ["b.png"]


def test_a_worker_takes_and_gives_urls(worker: Worker, bundle: Path, tmp_path: Path) -> None:
    import fsspec

    images.write_image(tmp_path / "a.png", noise(20, 30, 3))
    store = fsspec.filesystem("memory")
    store.put_file(str(tmp_path / "a.png"), "/in/a.png")
    (tmp_path / "b.txt").touch()
    store.put_file(str(tmp_path / "b.txt"), "/in/sub/b.png")
    assert places.listing("memory://in", "*", recursive=False) == {"a.png": "memory://in/a.png"}
    found = places.listing("memory://in/", "*", recursive=True)
    assert found == {"a.png": "memory://in/a.png", "sub/b.png": "memory://in/sub/b.png"}
    said = outcomes(
        worker, *((url, f"memory://out/{name}") for name, url in found.items()), ("memory://x", "memory://y")
    )
    assert said[0] == ""
    assert "b.png is not" in said[1]
    assert said[2].startswith("cannot read memory://x: ")
    store.get_file("/out/a.png", str(tmp_path / "restored.png"))
    expected = DeblurEngine(bundle, "cpu")(images.read_image(tmp_path / "a.png"))
    np.testing.assert_array_equal(images.read_image(tmp_path / "restored.png"), expected)
    assert store.find("/out") == ["/out/a.png"]
    written = store.modified("/out/a.png")
    assert outcomes(worker, ("memory://in/a.png", "memory://out/a.png")) == [""]
    assert store.modified("/out/a.png") == written


@pytest.mark.parametrize(
    ("place", "error", "says"),
    [
        ("memory://none", MissingFileError, "no such file or folder: memory://none"),
        ("nonsense://a/b", DeblurError, "cannot open nonsense://a/b"),
    ],
)
def test_a_bad_url_is_one_line(place: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as raised:
        places.listing(place, "*", recursive=False)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "ray"), [(["a"], None), (["a", "--ray"], ()), (["a", "--ray", "auto", "--out", "b"], ("auto",))]
)
def test_the_address_may_be_left_out(given: list[str], ray: tuple[str, ...] | None) -> None:
    assert parse_arguments(RunConfig, "deblur-run", given).ray == ray


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{photos}", "--ray", "a:1", "b:2"], "one address, not 'b:2'"),
        (["{photos}/absent.jpg", "--ray"], "absent.jpg"),
        (["{photos}", "{photos}/../talk.mp4", "--ray"], "talk.mp4 is a video"),
        (["{photos}", "--out", "{photos}", "--ray"], "overwritten by its own result"),
        (["file://{photos}", "--out", "file://{photos}", "--ray"], "overwritten by its own result"),
        (["{photos}/a.jpg", "file://{photos}/a.jpg", "--ray"], "would both be written to"),
        (["file://{photos}/none", "--ray"], "no such file or folder: file://"),
        (["file://{photos}", "--glob", "", "--ray"], "glob is ''"),
        (["file://{photos}", "--seconds", "3", "--ray"], "--seconds is for a live source"),
        (["file://{photos}", "--threads", "-1", "--ray"], "threads is -1; allowed: 1 to"),
        (["file://{photos}", "--glob", "x*", "--ray"], "no images match 'x*'"),
        (["{photos}", "--model", "{photos}/none", "--ray"], "no such model"),
        pytest.param(["{photos}", "--ray", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1 (", marks=needs_ray),
        pytest.param(["{photos}", "--ray", "nonsense"], "no Ray cluster at nonsense (", marks=needs_ray),
    ],
)
@quiet
def test_a_users_mistake_is_one_line(monkeypatch, tmp_path, photos, bundle, capsys, arguments, says) -> None:
    (tmp_path / "talk.mp4").touch()
    given = [argument.format(photos=photos) for argument in arguments]
    ray = given.index("--ray")
    more = [] if "--model" in given else ["--model", str(bundle)]
    more += [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert deblur_run(monkeypatch, *given[:ray], *more, *given[ray:]) == common.USER_ERROR
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


@quiet
def test_without_ray_it_says_what_to_install(monkeypatch, tmp_path, photos, bundle, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = photos, "--out", tmp_path / "out", "--model", bundle, "--ray"
    assert deblur_run(monkeypatch, *arguments) == common.USER_ERROR
    assert "ray is not installed; pip install 'deblur-deploy[ray]'" in capsys.readouterr().err


def test_results_in_a_store_are_named_by_url(photos: Path) -> None:
    config = RunConfig(inputs=(str(photos),), out=Path("s3://bucket/x"), recursive=True, glob="[!b]*", ray=())
    assert [task.target for task in cluster.planned(config)[0]] == [
        "s3://bucket/x/a.jpg", "s3://bucket/x/deep.png", "s3://bucket/x/sub/c.tif",
    ]  # fmt: skip


def test_a_store_is_asked_once_for_what_is_finished(monkeypatch, tmp_path: Path, photos: Path, capsys) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("a.jpg", "deep.png"):
        store.pipe_file(f"/finished/{name}", b"")
    monkeypatch.setattr(places, "exists", None)
    arguments = photos, "--glob", "[ad]*", "--out", "memory://finished", "--ray"
    assert deblur_run(monkeypatch, *arguments) == common.OK
    assert "nothing to do: all 2 were in memory://finished already" in capsys.readouterr().err
    store.rm("/finished/a.jpg")
    config = RunConfig(inputs=(str(photos),), out=Path("memory://finished"), ray=())
    assert cluster._there(config, []) == {"memory://finished/deep.png"}


def test_results_inside_of_a_store_are_not_restored_again() -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("a.jpg", ".thumb.jpg", "sub/b.jpg", ".trash/c.jpg", "restored/a.jpg"):
        store.pipe_file(f"/again/{name}", b"")
    out = "memory://again/restored"
    tasks, _ = cluster.planned(RunConfig(inputs=("memory://again",), out=Path(out), recursive=True, ray=()))
    assert [task.target for task in tasks] == [f"{out}/a.jpg", f"{out}/sub/b.jpg"]


@pytest.mark.parametrize(
    ("nodes", "provider", "threads", "is_"),
    [
        ([{"CPU": 16}, {"CPU": 16}], "auto", None, (2, 16, 0)),
        ([{"CPU": 16}, {"CPU": 40}, {}], "cpu", None, (3, 16, 0)),
        ([{"CPU": 16}, {"CPU": 4}], "auto", 8, (2, 8, 0)),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 16}], "auto", None, (4, 1, 1)),
        ([{"CPU": 16, "GPU": 4}], "openvino", None, (1, 16, 0)),
    ],
)
def test_workers_are_sized_by_the_nodes(nodes, provider, threads, is_) -> None:
    assert pool(nodes, Settings(model=None, provider=provider, threads=threads)) == is_


def test_a_pool_needs_room_for_one() -> None:
    with pytest.raises(InputError, match="8 free cores"):
        pool([{"CPU": 4}], Settings(model=None, threads=8))


def test_a_model_travels_whole(bundle: Path, tmp_path: Path) -> None:
    name, sent = packed(bundle)
    assert (name, sent["int8.onnx"]) == ("tiny", (bundle / "int8.onnx").read_bytes())
    assert packed(bundle / "int8.onnx") == ("int8.onnx", {"": (bundle / "int8.onnx").read_bytes()})
    with pytest.raises(MissingFileError):
        packed(tmp_path / "none")
