"""What must travel to measure on a machine with a GPU but no registry: onnxruntime-gpu made small, and other wheels.

    pip download onnxruntime-gpu==1.31.1 --no-deps --python-version 3.12 --only-binary=:all: -d /tmp/ort
    python -m benchmarks.gpu_wheel /tmp/ort/onnxruntime_gpu-*.whl PACK

More than half of that wheel is machine code for other GPUs.  CUDA's compiler keeps it in the section ``.nv_fatbin`` of
a library: containers of entries, one for each GPU that the code was compiled for.  The payload of entries for other
architectures becomes zeros, which compress to nothing; offsets and sizes stay.  A container without code for the wanted
one stays whole.  The library for programs in C is left out.  The result is cut into parts that each fit into one
transfer; ``benchmarks/measure_on_gpu.sh PACK`` joins them.  It is for measuring there only: a wheel changed in this way
is not to be installed or handed on.
"""

from __future__ import annotations

import base64
import hashlib
import re
import struct
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu_pack import download
from deblur_deploy.cli.common import OK, guarded
from deblur_deploy.errors import InputError
from deblur_deploy.files import existing, writing_folder

LIBRARY = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
_NOT_NEEDED = re.compile(r"onnxruntime/capi/libonnxruntime\.so[.\d]*")
"""What programs in C link with; Python's module holds the same once more."""
PART = "onnxruntime_gpu.whl.part"
_SECTION = ".nv_fatbin"
_MAGIC = 0xBA55ED50
_HEADER = struct.Struct("<IHHQ")
"""Of a container: magic, version, its own size, bytes of all entries."""
_ENTRY = struct.Struct("<HHIQ12xI")
"""Of an entry: kind, version, its own size, bytes of the payload, architecture."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Make onnxruntime-gpu small enough to carry, and pack it with what else is needed."""

    wheel: tyro.conf.Positional[Path]
    """onnxruntime_gpu-*.whl as it was downloaded."""
    pack: tyro.conf.Positional[Path]
    """Folder to make."""
    arch: int = 90
    """Architecture that is kept: 90 is Hopper (H100, H200)."""
    part_mb: float = 55
    """Megabytes of a part at most."""
    python: str = "3.12"
    """Python of the other machine."""
    wheels: bool = True
    """Download the other wheels too."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Machine code for one GPU."""

    arch: int
    start: int
    """Where its payload begins in the file."""
    size: int


def section(library: bytes | bytearray, name: str) -> tuple[int, int]:
    """Offset and size of a section of a 64-bit ELF file; raises InputError if it is none or has no such section."""
    if bytes(library[:5]) != b"\x7fELF\x02":
        raise InputError("the library is no 64-bit ELF file; give the wheel for Linux")
    (table,) = struct.unpack_from("<Q", library, 0x28)
    each, count, names_at = struct.unpack_from("<HHH", library, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", library, table + each * i) for i in range(count)]
    names = headers[names_at][4]
    for at, _, _, _, offset, size in headers:
        if library[names + at : library.index(b"\0", names + at)].decode("ascii", "replace") == name:
            return offset, size
    raise InputError(f"the library has no section {name}; is it the wheel of onnxruntime-gpu?")


def containers(library: bytes | bytearray, offset: int, size: int) -> Iterator[list[Entry]]:
    """The entries of each container in ``library[offset:offset + size]``; raises InputError for what is none."""
    at, end = offset, offset + size
    while at + _HEADER.size <= end:
        magic, _, own, entries = _HEADER.unpack_from(library, at)
        if magic != _MAGIC:
            if any(library[at : at + 8]):
                raise InputError(f"no container at byte {at - offset} of {_SECTION}; the format is another")
            at += 8  # They begin at multiples of 8.
            continue
        inside, last, found = at + own, at + own + entries, list[Entry]()
        while inside + _ENTRY.size <= last:
            _, _, header, payload, arch = _ENTRY.unpack_from(library, inside)
            if not _ENTRY.size <= header <= header + payload <= last - inside:
                raise InputError(f"an entry at byte {inside - offset} of {_SECTION} leaves its container")
            found.append(Entry(arch=arch, start=inside + header, size=payload))
            inside += header + payload
        yield found
        at = last


def trim(library: bytearray, arch: int) -> dict[str, int]:
    """Zero the code for other architectures than ``arch``; returns the bytes of machine code ``kept`` and ``zeroed``.

    Code of another kind, such as PTX, goes too: nobody compiles it where machine code for the GPU is there.
    """
    count = {"kept": 0, "zeroed": 0, "containers": 0, "without": 0}
    for entries in containers(library, *section(library, _SECTION)):
        there = any(entry.arch == arch for entry in entries)
        count["containers"] += 1
        count["without"] += not there
        for entry in entries:
            if there and entry.arch != arch:
                library[entry.start : entry.start + entry.size] = bytes(entry.size)
            count["zeroed" if there and entry.arch != arch else "kept"] += entry.size
    if not count["containers"] or count["without"] == count["containers"]:
        raise InputError(f"the library has no code for architecture {arch}; choose another --arch")
    return count


def repacked(wheel: Path, target: Path, arch: int) -> dict[str, int]:
    """Write ``wheel`` with its library trimmed to ``target``; returns what ``trim`` counted."""
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as made:
        if LIBRARY not in source.namelist():
            raise InputError(f"{wheel} has no {LIBRARY}; give the wheel of onnxruntime-gpu for Linux")
        library = bytearray(source.read(LIBRARY))
        count = trim(library, arch)
        digest = base64.urlsafe_b64encode(hashlib.sha256(library).digest()).rstrip(b"=").decode()
        for info in source.infolist():
            if _NOT_NEEDED.fullmatch(info.filename):
                continue
            data = bytes(library) if info.filename == LIBRARY else source.read(info)
            if info.filename.endswith(".dist-info/RECORD"):
                lines = [line for line in data.decode().splitlines() if not _NOT_NEEDED.match(line)]
                mine = f"{LIBRARY},sha256={digest},{len(library)}"
                data = "".join(f"{mine if line.startswith(LIBRARY) else line}\n" for line in lines).encode()
            made.writestr(info, data, zipfile.ZIP_DEFLATED, compresslevel=9)
    return count


def split(path: Path, folder: Path, part_mb: float) -> list[Path]:
    """Cut a file into parts of at most ``part_mb`` in ``folder``, and leave its SHA-256 beside them."""
    parts: list[Path] = []
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(int(part_mb * 1e6)):
            parts.append(folder / f"{PART}{len(parts)}")
            parts[-1].write_bytes(data)
            digest.update(data)
    (folder / "onnxruntime_gpu.whl.sha256").write_text(f"{digest.hexdigest()}  onnxruntime_gpu.whl\n")
    return parts


def command(argv: Sequence[str] | None) -> int:
    """Make the pack."""
    arguments = tyro.cli(Arguments, args=argv)
    existing(arguments.wheel, kind="file")
    with writing_folder(arguments.pack, force=True) as folder:
        whole = folder / "whole.whl"
        count = repacked(arguments.wheel, whole, arguments.arch)
        made, parts = whole.stat().st_size, split(whole, folder, arguments.part_mb)
        whole.unlink()
        if arguments.wheels:
            download(folder / "wheels", arguments.python)
    print(
        f"{arguments.pack}: {arguments.wheel.stat().st_size / 1e6:.1f} MB became {made / 1e6:.1f} in {len(parts)} "
        f"parts; {count['zeroed'] / 1e6:.1f} MB of code zeroed, {count['kept'] / 1e6:.1f} kept in "
        f"{count['containers']} containers, of which {count['without']} had none for {arguments.arch}"
    )
    return OK


main = guarded("gpu_wheel.py", command)

if __name__ == "__main__":
    sys.exit(main())
