"""Stages: nothing is done twice, nothing damaged is believed, and a killed run goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import deblur_deploy
from deblur_deploy.errors import InputError, OutputError
from deblur_deploy.pipeline.bundle import _cache
from deblur_deploy.pipeline.cache import Cache
from deblur_deploy.pipeline.stages import Stages, source_hash

CODE = ("deblur_deploy.files",)
KEY = 64 * "0"


class Bench:
    """Runs one stage in a new run each time; counts how often it is really made."""

    def __init__(self, folder, **options):
        self.cache, self.folder, self.said, self.made = Cache(folder / "cache", **options), folder, [], 0

    def run(self, name="stage", *, text="content", **changed):
        def make(folder):
            self.made += 1
            (folder / "a.txt").write_text(text)
            (folder / "b.bin").write_bytes(bytes(1000))
            return {"found": [1, 2.5, text]}

        work = self.folder / f"work{time.perf_counter_ns()}"
        arguments = {"code": CODE, "inputs": {"x": "1"}, "config": {"c": 1}, "environment": {"numpy": "2"}, **changed}
        return Stages(self.cache, work, self.said.append).run(name, make, **arguments)

    def entries(self):
        return [path for path in self.cache.folder.iterdir() if path.is_dir()]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_the_second_run_takes_what_the_first_made(bench):
    first, second = bench.run(), bench.run()
    assert bench.made == 1
    assert (first.cached, second.cached) == (False, True)
    assert (first.record, first.outputs, first.made) == (second.record, second.outputs, second.made)
    assert second.record == {"found": [1, 2.5, "content"]}
    assert {path.name: path.read_bytes() for path in second.folder.iterdir()} == {
        "a.txt": b"content",
        "b.bin": bytes(1000),
    }
    assert bench.said[-1] == f"stage: from the cache, made {first.made}"


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "other"},
        {"inputs": {"x": "2"}},
        {"inputs": {"y": "1"}},
        {"config": {"c": 2}},
        {"environment": {"numpy": "3"}},
        {"code": ("deblur_deploy.contract",)},
    ],
)
def test_whatever_decides_the_result_is_in_its_key(bench, changed):
    bench.run()
    assert not bench.run(**changed).cached
    assert bench.run().cached
    assert bench.made == 2


def test_what_is_done_to_a_result_does_not_reach_the_cache(bench):
    (bench.run().folder / "a.txt").write_text("mine")
    assert (bench.run().folder / "a.txt").read_text() == "content"


@pytest.mark.parametrize("name", ["a.txt", "b.bin", "entry.json"])
@pytest.mark.parametrize("how", ["truncated", "emptied", "edited", "removed", "a folder"])
def test_a_damaged_entry_is_found_and_made_again(bench, name, how):
    bench.run()
    path = bench.entries()[0] / name
    data = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "removed":
        path.write_bytes({"truncated": data[:-1], "emptied": b"", "edited": bytes([data[0] ^ 1]) + data[1:]}[how])
    again = bench.run()
    assert not again.cached
    assert (again.folder / "a.txt").read_text() == "content"
    assert [line for line in bench.said if "damaged" in line and name in line and line.endswith("; made again")]
    assert bench.run().cached


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), OutputError),
        (InputError("wrong"), InputError),
        (KeyboardInterrupt(),) * 2,
    ],
)
def test_a_stage_that_fails_leaves_nothing(bench, error, raised):
    def make(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(raised if isinstance(raised, type) else type(raised)):
        Stages(bench.cache, bench.folder / "work").run("stage", make, code=CODE, inputs={})
    assert bench.entries() == []


@pytest.mark.parametrize("resumes", [True, False])
def test_a_stage_that_resumes_finds_what_it_left(bench, resumes):
    seen = []

    def make(folder):
        seen.append([path.name for path in folder.iterdir()])
        (folder / "state").write_text("half")
        if len(seen) == 1:
            raise KeyboardInterrupt
        (folder / "state").unlink()
        return {}

    stages = Stages(bench.cache, bench.folder / "work")
    with pytest.raises(KeyboardInterrupt):
        stages.run("train", make, code=CODE, inputs={}, resumes=resumes)
    assert stages.run("train", make, code=CODE, inputs={}, resumes=resumes).outputs == {}
    assert seen == [[], ["state"] if resumes else []]


_SCRIPT = """
import sys, time
from pathlib import Path
from deblur_deploy.pipeline.cache import Cache
from deblur_deploy.pipeline.stages import Stages
room = Path(sys.argv[1])
stages = Stages(Cache(room / "cache"), room / sys.argv[2], lambda line: print(line, flush=True))
def slow(folder):
    (folder / "state").write_text((folder / "state").read_text() + "+" if (folder / "state").exists() else "begun")
    (room / "begun").touch()
    while not (room / "go").exists():
        time.sleep(0.01)
    return {}
stages.run("quick", lambda folder: {}, code=(), inputs={})
print(stages.run("slow", slow, code=(), inputs={}, resumes=True).folder.joinpath("state").read_text())
"""


def start(room, work):
    return subprocess.Popen([sys.executable, "-c", _SCRIPT, room, work], stdout=subprocess.PIPE, text=True)


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_run_goes_on_and_two_runs_at_once_do_it_once(tmp_path):
    killed = start(tmp_path, "killed")
    wait_for(tmp_path / "begun")
    killed.send_signal(signal.SIGKILL)
    assert killed.communicate()[0] == "quick\nslow\n"
    (tmp_path / "begun").unlink()
    first = start(tmp_path, "first")
    wait_for(tmp_path / "begun")
    second = start(tmp_path, "second")
    said = [second.stdout.readline() for _ in range(2)]
    assert "quick: from the cache" in said[0]
    assert said[1] == "slow: another run is at it; waiting\n"
    (tmp_path / "go").touch()
    lines = first.communicate()[0].splitlines()
    assert "quick: from the cache" in lines[0]
    assert lines[1:] == ["slow", "begun+"]
    assert second.communicate()[0].splitlines()[-1] == "begun+"


def test_the_entries_not_used_for_longest_go_first(tmp_path):
    bench = Bench(tmp_path, max_bytes=3500)
    for age, name in enumerate(("old", "older")):
        bench.run(name)
        newest = max(bench.entries(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (1000 - age, 1000 - age))
    assert bench.run("old").cached  # and so it is the one used last
    bench.run("third")
    made = bench.made
    assert bench.run("old").cached
    assert bench.run("third").cached
    assert not bench.run("older").cached
    assert bench.made == made + 1
    assert sum(path.stat().st_size for path in bench.cache.folder.rglob("*") if path.is_file()) <= 3500


def test_what_tuning_and_training_keep_beside_the_entries_is_not_removed(tmp_path):
    cache = Cache(tmp_path, max_bytes=0)
    for name in ("bank", "hub", "tuned", "of the user's own", KEY):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("precious")
    cache.shrink()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"bank", "hub", "tuned", "of the user's own"}


def test_what_somebody_is_making_is_not_removed(tmp_path):
    cache = Cache(tmp_path, max_bytes=0)
    with cache.locked(KEY, lambda: None):
        (cache.part(KEY, keep=False) / "state").write_text("precious")
        cache.shrink()
        assert (tmp_path / f"{KEY}.part" / "state").exists()
    cache.shrink()
    assert not (tmp_path / f"{KEY}.part").exists()


def test_the_cache_lies_where_the_user_wants_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DEBLUR_CACHE", str(tmp_path / "mine"))
    assert Cache.usual().folder == tmp_path / "mine"
    monkeypatch.delenv("DEBLUR_CACHE")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert Cache.usual().folder == tmp_path / "xdg" / "deblur-deploy"


def test_a_cache_that_cannot_be_used_is_said_and_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEBLUR_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"cannot use the cache .*file.*DEBLUR_CACHE"):
        Cache.usual()
    said: list[str] = []
    cache = _cache(tmp_path / "work", True, said.append)
    assert cache.folder.is_relative_to(tmp_path / "work")
    assert "cannot use the cache" in said[0]


def test_a_user_without_a_home_has_no_cache(tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("DEBLUR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    said: list[str] = []
    assert _cache(tmp_path / "work", True, said.append).folder.is_relative_to(tmp_path / "work")
    assert said == [
        "there is no home directory for a cache; set DEBLUR_CACHE to a folder; nothing is kept for another run"
    ]


def test_source_hash_follows_imports_anywhere_in_a_module(tmp_path, monkeypatch):
    package = tmp_path / "deblur_deploy"
    shutil.copytree(Path(deblur_deploy.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(deblur_deploy, "__file__", str(package / "__init__.py"))
    of = source_hash.__wrapped__
    before = {name: of(f"deblur_deploy.pipeline.{name}") for name in ("export", "doors.source", "verify", "report")}

    def changed(path):
        with (package / path).open("a") as file:
            file.write("\n# changed\n")
        now = {name: of(f"deblur_deploy.pipeline.{name}") for name in before}
        names = {name for name in before if now[name] != before[name]}
        before.update(now)
        return names

    assert changed("pipeline/graph.py") == {"export", "doors.source", "verify"}
    assert changed("training/validation.py") == {"doors.source"}  # imported inside a function
    assert changed("evaluation/plots.py") == {"report"}
    assert changed("cli/export.py") == set()
    assert changed("__init__.py") == {"export", "doors.source", "verify", "report"}
