"""What a folder holds is done, or counted by reason."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from deblur_deploy.errors import MissingFileError
from deblur_deploy.media.listing import look_into

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no pipes with names")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "b.PNG",
        "a.jpg",
        "e.jfif",
        "f.jpe",
        ".a.jpg",
        "c.txt",
        "c",
        "d.mp4",
        "sub/e.tif",
        "sub/f.heic",
        ".bin/g.jpg",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "p.png")
    (tmp_path / "l.jpg").symlink_to("none")
    (tmp_path / "m.jpg").symlink_to("a.jpg")
    (tmp_path / "ring").symlink_to(".")
    return tmp_path


def test_all_that_is_not_listed_is_counted(folder: Path) -> None:
    found = look_into(folder)
    assert [path.name for path in found.paths] == ["a.jpg", "b.PNG", "d.mp4", "e.jfif", "f.jpe", "m.jpg"]
    counts = {"hidden": 2, ".txt": 1, "without a suffix": 1, "pipes": 1, "broken links": 1}
    assert found.left_out == Counter({**counts, "folders (--recursive goes into them)": 2})
    assert [path.name for path in look_into(folder, "a*").paths] == ["a.jpg"]
    deep = look_into(folder, recursive=True)
    assert [path.name for path in deep.paths] == ["a.jpg", "b.PNG", "d.mp4", "e.jfif", "f.jpe", "m.jpg", "e.tif"]
    assert deep.left_out == Counter({**counts, ".heic": 1, "linked folders": 1})
    assert look_into(folder, recursive=True, but=folder / "sub" / ".." / "sub").left_out[".heic"] == 0


@pytest.mark.parametrize("broken", ["sub", "a.jpg"])
def test_what_cannot_be_looked_at_ends_nothing(folder: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a locked folder, whose files even their kind is not told of; root, as tests may run, sees them all."""
    iterdir, stat = Path.iterdir, Path.stat

    def failing(method, path, **options):  # type: ignore[no-untyped-def]
        if path == folder / broken:
            raise PermissionError(13, "Permission denied", str(path))
        return method(path, **options)

    if broken == "sub":
        monkeypatch.setattr(Path, "iterdir", lambda path: failing(iterdir, path))
    else:
        monkeypatch.setattr(Path, "stat", lambda path, **options: failing(stat, path, **options))
    found = look_into(folder, recursive=True)
    assert found.failed == [f"cannot read {folder / broken}: Permission denied"]
    assert "b.PNG" in [path.name for path in found.paths]


def test_the_folder_itself_must_be_readable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", locked)
    with pytest.raises(MissingFileError, match=r"cannot read .*: Permission denied"):
        look_into(folder)
