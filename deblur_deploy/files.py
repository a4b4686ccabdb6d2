"""Files that exist whole or not at all, and the hash that names their content."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from deblur_deploy.errors import DeblurError, MissingFileError, OutputError

try:
    import fcntl
except ImportError:  # on Windows, where what killed processes left stays
    fcntl = None  # type: ignore[assignment]


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing_file(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``target`` (same suffix); rename it to ``target`` if the block succeeds.

    A symbolic link is followed, and who may read an existing file may read the new one.  Raises OutputError if the
    folder cannot be written, the disk is full or ``target`` is a pipe or a device; the temporary file is then removed.
    """
    target = Path(os.path.realpath(target))
    _refuse_special(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask()
        temporary, held = _held(_new_file, target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}; choose another place") from None
    try:
        yield temporary
        _keep(temporary)
        with suppress(PermissionError):  # a mount whose files all belong to somebody else
            os.chmod(temporary, mode)
        os.replace(temporary, target)
    except DeblurError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}; nothing was left behind") from None
    finally:
        temporary.unlink(missing_ok=True)
        _let_go(held)


def _keep(path: Path) -> None:
    """See that the content is on the disk before its name is: after a power cut a file is whole, or not there."""
    handle = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def leftovers(targets: Iterable[Path]) -> Iterator[Path]:
    """What other processes are writing for ``targets``, or were, by the names that :func:`writing_file` gives."""
    wanted = {(target.parent, _prefix(target.stem, target.suffix), target.suffix) for target in targets}
    for folder in {folder for folder, _, _ in wanted}:
        with suppress(OSError):
            for path in folder.iterdir():
                named = re.fullmatch(rf"(\..*{_MARK})[a-z0-9_]{{8}}(\.[^.]*)?", path.name, re.DOTALL)
                if named and (folder, named[1], named[2] or "") in wanted:
                    yield path


def remove_leftovers(targets: Iterable[Path]) -> None:
    """Delete what killed processes were writing for ``targets``."""
    for path in leftovers(targets):
        _if_abandoned(path, Path.unlink)


_MARK = "-deblur-"
"""In every temporary name, so that no hidden file of the user's is taken for one."""
_SHORT = 128
"""Bytes that a temporary name may have in any case; file systems take 143 or 255."""


def _prefix(stem: str, suffix: str = "") -> str:
    """What a temporary name begins with: ``stem``, cut where it would be longer than the long name that it is for."""
    name, given = os.fsencode(stem + suffix), os.fsencode(stem)
    room = max(len(name), _SHORT) - (len(name) - len(given)) - len(f".{_MARK}12345678")
    return f".{stem if len(given) <= room else given[:room].decode(errors='ignore')}{_MARK}"


def refuse_unwritable(target: Path) -> None:
    """Raise OutputError if ``target`` cannot become a file (call it before any costly work)."""
    if os.path.isdir(target):  # noqa: PTH112, since it does not raise inside a locked folder
        raise OutputError(f"{target} is a folder, a file is needed; choose another name")
    _refuse_special(target)
    make_folder(target.parent, target)


def _refuse_special(target: Path) -> None:
    """Raise OutputError for what would be gone if a file took its place, as /dev/null."""
    try:
        found = kind_of(target)
    except MissingFileError:  # the system does not tell, and will not let it be written either
        return
    if found in ("pipe", "device"):
        raise OutputError(f"{target} is a {found}, a file is needed; choose another name")


def make_folder(folder: Path, target: Path | None = None) -> None:
    """Make ``folder``; raises OutputError, about ``target`` if one is given, if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        where = f"to {folder}" if target is None else str(target)
        raise OutputError(f"cannot write {where}: {error.strerror}; choose another place") from None


@contextmanager
def writing_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder; rename it to ``target`` if the block succeeds.

    An existing ``target`` is refused with OutputError unless ``force``, and is then replaced only at the end; a
    symbolic link is followed.  What killed processes left of the same target is removed.
    """
    target = Path(os.path.realpath(target))
    _tidy_up(target)
    refuse_existing(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, handle = _held(_new_folder, target)
        temporary.chmod(0o777 & ~_umask())
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}; choose another place") from None
    try:
        yield temporary
        refuse_existing(target, force=force)
        _replace_folder(temporary, target)
    except DeblurError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}; nothing was left behind") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _let_go(handle)


def _new_file(target: Path) -> Path:
    handle, name = tempfile.mkstemp(target.suffix, _prefix(target.stem, target.suffix), target.parent)
    os.close(handle)
    return Path(name)


def _new_folder(target: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target.name)))


def _held(new: Callable[[Path], Path], target: Path) -> tuple[Path, int | None]:
    """A ``new`` hidden sibling of ``target``, and its lock, which ends with this process."""
    while True:
        path = new(target)
        # Somebody may come between, and take it for abandoned.
        with suppress(BlockingIOError, FileNotFoundError):
            handle = _lock(path)
            if path.exists():
                return path, handle
            _let_go(handle)


def _tidy_up(target: Path) -> None:
    """Remove what killed processes left of ``target``, and put it back if one was killed between two renames."""

    def remove(folder: Path) -> None:
        if (folder / _BEFORE).is_dir() and not target.exists():
            os.replace(folder / _BEFORE, target)
        shutil.rmtree(folder, ignore_errors=True)

    for folder in target.parent.glob(f"{glob.escape(_prefix(target.name))}????????"):
        _if_abandoned(folder, remove)


def _if_abandoned(path: Path, remove: Callable[[Path], object]) -> None:
    """Call ``remove``, unless somebody is still at ``path``, or this system does not tell."""
    with suppress(OSError):
        if (handle := _lock(path)) is not None:
            try:
                remove(path)
            finally:
                _let_go(handle)


def _lock(path: Path) -> int | None:
    """Lock a file or folder; None where there are no such locks.  Raises BlockingIOError if another process has it."""
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _let_go(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


_BEFORE = ".before"
"""What a folder is called while its successor is put in its place."""


def _replace_folder(new: Path, target: Path) -> None:
    """A folder cannot be renamed onto a full one, so the old one steps aside, and back if the new one fails."""
    old, handle = _held(_new_folder, target)
    before = old / _BEFORE
    try:
        if target.exists():
            os.replace(target, before)
        try:
            os.replace(new, target)
        except OSError:
            if before.exists():
                os.replace(before, target)
            raise
    finally:
        if target.exists() or not before.exists():  # or else the next to come puts it back
            shutil.rmtree(old, ignore_errors=True)
        _let_go(handle)


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise OutputError if ``target`` exists and may not be replaced (call it before any costly work)."""
    if target.is_file():
        raise OutputError(f"{target} is a file, a folder is needed; choose another --out")
    if target.exists() and (target.resolve() == Path.cwd() or target.is_mount()):
        raise OutputError(f"{target} cannot be replaced as a whole (it is in use or a mount); name a folder inside it")
    try:
        full = target.is_dir() and any(target.iterdir())
    except OSError as error:
        raise OutputError(f"cannot read {target}: {error.strerror}; choose another --out") from None
    if full and not force:
        raise OutputError(f"{target} exists and is not empty; choose another --out or give --force")


def existing(path: Path, *, kind: str) -> Path:
    """``path`` if it exists as ``kind`` ("file" or "folder") and, as a file, may be read.

    Raises MissingFileError that says what is there otherwise.
    """
    found = kind_of(path)
    if not found:
        raise MissingFileError(f"no such {kind}: {path}")
    if found != kind:
        raise MissingFileError(f"{path} is a {found}, a {kind} is needed")
    if kind == "file":
        try:
            path.open("rb").close()
        except OSError as error:
            raise MissingFileError(f"cannot read {path}: {error.strerror}") from None
    return path


def kind_of(path: Path) -> str:
    """``file``, ``folder``, ``pipe`` or ``device``; empty if nothing is there.

    Raises MissingFileError if the system does not tell, as inside a locked folder.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no name at all
        return ""
    except OSError as error:
        raise MissingFileError(f"cannot read {path}: {error.strerror}") from None
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"


_asking = Lock()


def _umask() -> int:
    with _asking:  # the system only tells the old one when it is given another
        mask = os.umask(0)
        os.umask(mask)
    return mask
