"""benchmarks/gpu_wheel.py: machine code for other GPUs becomes zeros, and everything else stays what it was."""

from __future__ import annotations

import base64
import hashlib
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_wheel
from deblur_deploy.errors import InputError

ROOT = Path(__file__).parents[1]
CUBIN, PTX = 2, 1
Code = tuple[int, int, bytes]
"""Kind, architecture and payload of an entry."""


def container(*codes: Code) -> bytes:
    entries = b""
    for kind, arch, payload in codes:
        size = 64 + 8 * (arch == 120)  # a header may be longer than what is known of it
        head = struct.pack("<HHIQ12xI", kind, 0x101, size, len(payload), arch)
        entries += head + b"\xab" * (size - len(head)) + payload
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def elf(section: bytes, name: bytes = b".nv_fatbin") -> bytes:
    """A 64-bit ELF file of three sections: none, names, and this one."""
    names = b"\0.shstrtab\0" + name + b"\0"
    at_names, at_section = 64, 64 + len(names)
    table = at_section + len(section)
    head = b"\x7fELF\x02\x01\x01".ljust(0x28, b"\0") + struct.pack("<QIHHHHHH", table, 0, 64, 0, 0, 64, 3, 1)
    rows = [(0, 0, 0), (1, at_names, len(names)), (11, at_section, len(section))]
    headers = b"".join(struct.pack("<IIQQQQ24x", at, 1, 0, 0, offset, size) for at, offset, size in rows)
    return head + names + section + headers


def payload(seed: int, size: int = 104) -> bytes:
    return hashlib.shake_128(bytes([seed])).digest(size)


OLD, NEW, HOPPER, TEXT = (payload(seed, 104 + 8 * seed) for seed in range(4))
CONTAINERS = [
    [(CUBIN, 80, OLD), (CUBIN, 90, HOPPER), (CUBIN, 120, NEW), (PTX, 120, TEXT)],
    [(CUBIN, 80, OLD), (PTX, 80, TEXT)],  # nothing for Hopper, which then needs all of it
    [(CUBIN, 90, HOPPER)],
]
TRIMMED = [
    [(CUBIN, 80, bytes(len(OLD))), (CUBIN, 90, HOPPER), (CUBIN, 120, bytes(len(NEW))), (PTX, 120, bytes(len(TEXT)))],
    *CONTAINERS[1:],
]


def library(containers: list[list[Code]]) -> bytes:
    # Padding lies between some of them.
    return elf((b"\0" * 24).join(container(*codes) for codes in containers))


def test_only_code_for_other_gpus_becomes_zeros() -> None:
    data = bytearray(library(CONTAINERS))
    count = gpu_wheel.trim(data, 90)
    assert bytes(data) == library(TRIMMED)
    zeroed = len(OLD) + len(NEW) + len(TEXT)
    assert count == {"kept": 2 * len(HOPPER) + len(OLD) + len(TEXT), "zeroed": zeroed, "containers": 3, "without": 1}
    assert gpu_wheel.trim(data, 90) == count
    assert bytes(data) == library(TRIMMED)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"MZ" + bytes(100), "no 64-bit ELF file"),
        (elf(b"", b".text"), "no section .nv_fatbin"),
        (elf(b""), "no code for architecture 90"),
        (library([CONTAINERS[1]]), "no code for architecture 90"),
        (elf(b"nonsense" + container((CUBIN, 90, HOPPER))), "no container at byte 0"),
        (
            elf(container((CUBIN, 90, HOPPER)).replace(struct.pack("<Q", len(HOPPER)), struct.pack("<Q", 9999))),
            "leaves",
        ),
    ],
)
def test_what_is_something_else_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(InputError, match=says):
        gpu_wheel.trim(bytearray(data), 90)


def test_the_wheel_is_packed_again_and_cut_into_parts_that_join(tmp_path: Path, monkeypatch, capsys) -> None:
    about, wheel = "onnxruntime_gpu-1.dist-info", tmp_path / "onnxruntime_gpu-1.whl"
    twin = "onnxruntime/capi/libonnxruntime.so.1.31.1"
    kept = ["onnxruntime/__init__.py,sha256=x,4", f"{about}/RECORD,,"]
    record = "\n".join([f"{gpu_wheel.LIBRARY},sha256=old,1", f"{twin},sha256=y,9", *kept, ""])
    noise = payload(9, 5000)
    files = {
        gpu_wheel.LIBRARY: library(CONTAINERS), twin: noise, "onnxruntime/__init__.py": noise,
        f"{about}/RECORD": record.encode(),
    }  # fmt: skip
    with zipfile.ZipFile(wheel, "w") as made:
        for name, data in files.items():
            made.writestr(name, data)
    downloads: list[tuple[str, str]] = []
    monkeypatch.setattr(gpu_wheel, "download", lambda folder, python: downloads.append((folder.name, python)))
    pack = tmp_path / "pack"
    assert gpu_wheel.command([str(wheel), str(pack), "--part-mb", "0.002"]) == 0
    assert downloads == [("wheels", "3.12")]
    parts = sorted(pack.glob("onnxruntime_gpu.whl.part*"))
    assert len(parts) == 4
    assert max(part.stat().st_size for part in parts) <= 2000
    assert f"in {len(parts)} parts" in capsys.readouterr().out
    whole = tmp_path / "onnxruntime_gpu.whl"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert (pack / "onnxruntime_gpu.whl.sha256").read_text().split() == [
        hashlib.sha256(whole.read_bytes()).hexdigest(), whole.name,
    ]  # fmt: skip
    digest = base64.urlsafe_b64encode(hashlib.sha256(library(TRIMMED)).digest()).rstrip(b"=").decode()
    with zipfile.ZipFile(whole) as made:
        assert made.testzip() is None
        assert made.read(gpu_wheel.LIBRARY) == library(TRIMMED)
        assert made.read("onnxruntime/__init__.py") == noise
        assert twin not in made.namelist()
        lines = made.read(f"{about}/RECORD").decode().splitlines()
    assert lines == [f"{gpu_wheel.LIBRARY},sha256={digest},{len(library(TRIMMED))}", *kept]


def test_a_wheel_of_something_else_leaves_nothing(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as made:
        made.writestr("other.py", "")
    with pytest.raises(InputError, match="has no onnxruntime/capi/"):
        gpu_wheel.command([str(tmp_path / "other.whl"), str(tmp_path / "pack")])
    assert [path.name for path in tmp_path.iterdir()] == ["other.whl"]


@pytest.mark.skipif(sys.platform == "win32", reason="no bash")
def test_the_script_measures_what_it_says_even_if_a_step_fails(tmp_path: Path) -> None:
    """With a python3 that only says what it was asked."""
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@" >>"$ASKED"\ncase "$*" in *peers.py*) exit 3;; esac\n')
    fake.chmod(0o755)
    (tmp_path / "pack" / "wheels").mkdir(parents=True)
    (tmp_path / "pack" / "wheels" / "a.whl").touch()
    out, asked = tmp_path / "out", tmp_path / "asked"
    out.mkdir()
    environment = {"PATH": f"{fake.parent}:/usr/bin:/bin", "OUT": str(out), "PROVIDER": "cpu", "ASKED": str(asked)}

    def run(**more: str) -> tuple[int, list[str]]:
        command = ["bash", str(ROOT / "benchmarks" / "measure_on_gpu.sh"), str(tmp_path / "pack")]
        done = subprocess.run(command, env=environment | more, capture_output=True, text=True)
        steps = (out / "steps.txt").read_text().splitlines()
        assert done.stdout.splitlines() == steps, done.stderr
        return done.returncode, [f"{line.partition(':')[0]} {line.rpartition('status ')[2]}" for line in steps]

    status, steps = run()
    assert (status, steps) == (1, ["engine 0", "tests 0", "latency 0", "peers 3", "limits 0", "quality 0"])
    lines = asked.read_text().splitlines()
    assert lines[0].startswith("-m zipfile -e ")
    assert "tests/test_providers.py" in lines[2]
    assert all("--variants fp32 fp16" in line for line in lines[3:])
    assert all("1280x720 1920x1080 3840x2160" in line for line in lines[3:5])
    assert len(list(out.iterdir())) <= 8  # as many as come back from such a machine
    asked.unlink()
    assert run(LIMIT_S="5") == (1, [f"{name} left out, no time" for name in (
        "engine", "tests", "latency", "peers", "limits", "quality"
    )])  # fmt: skip
    assert len(asked.read_text().splitlines()) == 1
