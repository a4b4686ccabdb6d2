"""Files and folders exist whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from deblur_deploy.errors import MissingFileError, OutputError
from deblur_deploy.files import (
    existing,
    refuse_existing,
    refuse_unwritable,
    remove_leftovers,
    sha256,
    writing_file,
    writing_folder,
)
from tests.conftest import reading_as_nobody, unprivileged


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_appears_only_when_it_is_finished(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with writing_file(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert names(target.parent) == ["a.txt"]


@pytest.mark.parametrize("writing", [writing_file, lambda target: writing_folder(target, force=True)])
def test_a_full_disk_leaves_the_old_result(tmp_path, writing):
    target = tmp_path / "result"
    if writing is writing_file:
        target.write_text("old")
    else:
        target.mkdir()
        (target / "old").touch()
    with pytest.raises(OutputError, match="No space left"), writing(target):
        full_disk()
    assert names(tmp_path) == ["result"]
    assert target.read_text() == "old" if target.is_file() else names(target) == ["old"]


def test_a_folder_is_replaced_only_with_force(tmp_path):
    target = tmp_path / "bundle"
    for content in ("first", "second"):
        with writing_folder(target, force=content == "second") as temporary:
            (temporary / content).touch()
    assert names(target) == ["second"]
    assert names(tmp_path) == ["bundle"]
    with pytest.raises(OutputError, match="--force"), writing_folder(target):
        pass


def test_a_folder_that_cannot_be_replaced_keeps_its_content(tmp_path, monkeypatch):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").touch()
    replace = os.replace

    def refuse_new(source, destination):
        if Path(source).parent == tmp_path and Path(source) != target:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        replace(source, destination)

    monkeypatch.setattr(os, "replace", refuse_new)
    with pytest.raises(OutputError, match="busy"), writing_folder(target, force=True) as temporary:
        (temporary / "new").touch()
    assert names(tmp_path) == ["bundle"]
    assert names(target) == ["old"]


def test_the_working_folder_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="inside it"):
        refuse_existing(Path(), force=True)


def test_our_own_errors_pass_through(tmp_path):
    for writing in (writing_file, writing_folder):
        with pytest.raises(MissingFileError, match="mine"), writing(tmp_path / "x"):
            raise MissingFileError("mine")


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with writing_folder(tmp_path / "out") as temporary:
        (temporary / "a").touch()
    assert names(tmp_path / "out") == ["a"]


def test_a_kill_leaves_nothing_under_the_final_name(tmp_path):
    code = """
        import os, signal, sys
        from pathlib import Path
        from deblur_deploy.files import writing_folder
        with writing_folder(Path(sys.argv[1])) as folder:
            (folder / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "bundle")])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "bundle").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for writing in (writing_file, writing_folder):
        with pytest.raises(OutputError, match="cannot write"), writing(tmp_path / "file" / "below"):
            pass
    with pytest.raises(OutputError, match="is a file"):
        refuse_existing(tmp_path / "file", force=True)


@pytest.mark.parametrize(("kind", "message"), [("file", "is a folder"), ("folder", "is a file")])
def test_existing_says_what_is_there(tmp_path, kind, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    other = {"file": "folder", "folder": "file"}[kind]
    assert existing(tmp_path / kind, kind=kind) == tmp_path / kind
    with pytest.raises(MissingFileError, match=message):
        existing(tmp_path / other, kind=kind)
    with pytest.raises(MissingFileError, match="no such"):
        existing(tmp_path / "none", kind=kind)


@pytest.mark.parametrize("stem", ["x" * 251, "ü" * 125, "x" * 130])
def test_a_name_may_be_as_long_as_the_system_takes(tmp_path, stem):
    target = tmp_path / f"{stem}.jpg"
    with writing_file(target) as temporary:
        temporary.write_text("whole")
        # A system that takes no longer ones, as encrypting ones do, takes the temporary one too.
        assert len(os.fsencode(temporary.name)) <= len(os.fsencode(target.name))
        left = temporary.with_name(f"{temporary.stem[:-8]}_leftove.jpg")
        left.touch()
    other = left.with_name(".y-_leftove.jpg")
    other.touch()
    remove_leftovers([target])
    assert set(tmp_path.iterdir()) == {target, other}
    with writing_folder(tmp_path / f"{stem}.dir") as folder:
        (folder / "a").touch()
    with writing_folder(tmp_path / f"{stem}.dir", force=True):
        pass
    assert set(tmp_path.iterdir()) == {target, other, tmp_path / f"{stem}.dir"}


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes with names")
def test_a_device_or_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for check in (refuse_unwritable, lambda target: writing_file(target).__enter__()):
        with pytest.raises(OutputError, match="pipe is a pipe, a file is needed; choose another name"):
            check(tmp_path / "pipe")
    with pytest.raises(OutputError, match="/dev/null is a device"):
        refuse_unwritable(Path("/dev/null"))


def test_who_may_read_a_file_may_read_the_next(tmp_path):
    (tmp_path / "secret").touch(mode=0o600)
    for name in ("secret", "new"):
        with writing_file(tmp_path / name) as temporary:
            temporary.write_text("new")
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("secret", "new")] == [0o600, 0o644]


def test_a_pipe_is_called_one(tmp_path):
    os.mkfifo(tmp_path / "p.png")
    with pytest.raises(MissingFileError, match=r"p\.png is a pipe, a file is needed"):
        existing(tmp_path / "p.png", kind="file")


def test_sha256_is_the_known_one(tmp_path):
    (tmp_path / "abc").write_text("abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


ABANDONING = """
import os, sys
from pathlib import Path
from deblur_deploy.files import writing_folder
with writing_folder(Path(sys.argv[1])) as folder:
    (folder / "half").touch()
    print("writing", flush=True)
    sys.stdin.read() or os._exit(1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of that kind")
def test_what_a_killed_process_left_goes_and_what_one_is_writing_stays(tmp_path):
    target = tmp_path / "bund[l]e"
    command = [sys.executable, "-c", ABANDONING, target]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
    (tmp_path / ".bund[l]e-notours").mkdir()
    assert len(names(tmp_path)) == 2
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as alive:
        alive.stdout.readline()
        with writing_folder(target) as mine:
            assert len(names(tmp_path)) == 3, "the abandoned one is gone, two are being written"
            (mine / "a").touch()
        alive.communicate(b"go on")
    assert alive.returncode == 1, "the other one is told that somebody was faster"
    assert names(tmp_path) == [".bund[l]e-notours", target.name]


def test_leftovers_of_files_go(tmp_path):
    others = [
        ".a-20240101.png",
        ".a-deblur-ABCDEFGH.png",
        ".a-deblur-abcd1234",
        ".b-deblur-abc_1234.png",
        "a-deblur-a.png",
    ]
    for name in (".a-deblur-abc_1234.png", *others):
        (tmp_path / name).touch()
    remove_leftovers([tmp_path / "a.png", tmp_path / "none" / "a.png"])
    assert names(tmp_path) == others


def test_hidden_folders_of_the_users_stay(tmp_path):
    for name in (".hd-original", ".hd-20240101"):
        (tmp_path / name).mkdir()
    with writing_folder(tmp_path / "hd") as folder:
        (folder / "new").touch()
    assert names(tmp_path) == [".hd-20240101", ".hd-original", "hd"]


def test_a_mount_that_gives_every_file_one_owner_can_be_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    with writing_file(tmp_path / "a") as file:
        file.write_text("content")
    assert (tmp_path / "a").read_text() == "content"


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_what_somebody_is_writing_is_no_leftover(tmp_path):
    target = tmp_path / "a.png"
    with writing_file(target) as temporary:
        remove_leftovers([target])
        assert temporary.exists()
    assert names(tmp_path) == ["a.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")
def test_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    for name in ("folder", "file"):
        (tmp_path / name).symlink_to(tmp_path / "real" if name == "folder" else tmp_path / "real" / "file")
    with writing_folder(tmp_path / "folder", force=True) as folder:
        (folder / "new").touch()
    with writing_file(tmp_path / "file") as file:
        file.write_text("content")
    assert (tmp_path / "folder").is_symlink()
    assert (tmp_path / "file").is_symlink()
    assert names(tmp_path / "real") == ["file", "new"]
    assert names(tmp_path) == ["file", "folder", "real"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_a_folder_that_stood_aside_when_its_process_was_killed_comes_back(tmp_path):
    before = tmp_path / ".bundle-deblur-abcd1234" / ".before"
    before.mkdir(parents=True)
    (before / "old").touch()
    with pytest.raises(OutputError, match="is not empty"), writing_folder(tmp_path / "bundle") as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["bundle"]
    assert names(tmp_path / "bundle") == ["old"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes of that kind")
@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("none", "file", "no such file"),
        ("file/below", "folder", "no such folder"),
        ("pipe", "file", "is a pipe, a file is needed"),
        ("folder", "file", "is a folder, a file is needed"),
        ("file", "folder", "is a file, a folder is needed"),
        ("n" * 300, "file", "cannot read .*: File name too long"),
    ],
)
def test_what_is_there_instead_is_said(tmp_path, what, kind, says):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MissingFileError, match=says):
        existing(tmp_path / what, kind=kind)


@pytest.mark.parametrize("locked", [".", "folder", "folder/file"])
def test_what_is_locked_is_one_line(locked):
    with unprivileged() as room:
        (room / "folder").mkdir()
        (room / "folder" / "file").touch()
        (room / locked).chmod(0)
        with reading_as_nobody(), pytest.raises(MissingFileError, match=r"cannot read .*: Permission denied"):
            existing(room / "folder" / "file", kind="file")
        if locked == "folder":
            with reading_as_nobody(), pytest.raises(OutputError, match=r"cannot read .*: Permission denied"):
                refuse_existing(room / "folder", force=False)
