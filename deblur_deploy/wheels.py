"""Installed wheels: their versions, and which bring a library; of one family several write the same files."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distributions, version

ONNXRUNTIMES = (
    "onnxruntime", "onnxruntime-directml", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-silicon",
)  # fmt: skip
OPENCVS = ("opencv-contrib-python", "opencv-contrib-python-headless", "opencv-python", "opencv-python-headless")
FAMILIES = {"onnxruntime": ONNXRUNTIMES, "opencv": OPENCVS}
_BEST = ("onnxruntime-gpu", "opencv-contrib-python-headless", "opencv-python-headless")
"""What is kept: GPUs where they were wanted, and an OpenCV that needs no libraries of a desktop."""


def versions(*packages: str) -> dict[str, str]:
    """Versions of those of ``packages`` that are installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def installed(family: str) -> list[str]:
    """Names of the family's wheels that are installed, sorted."""
    names = {(item.name or "").lower().replace("_", "-") for item in distributions()}
    return sorted(names & {*FAMILIES[family]})


def clash(family: str) -> str:
    """What is wrong if several are installed, in words; empty if all is well."""
    wheels = installed(family)
    return f"{' and '.join(wheels)} overwrite each other's files" if len(wheels) > 1 else ""


def mend(family: str) -> str:
    """The command that leaves one wheel of the family, whole and new."""
    wheels = installed(family)
    usual = "opencv-python-headless" if family == "opencv" else family
    keep = next((name for name in _BEST if name in wheels), usual)
    if any(name.startswith("opencv-contrib") for name in wheels):
        keep = "opencv-contrib-python-headless"
    # With nothing removed first, pip would not put back what another wheel has overwritten.
    remove = f"pip uninstall -y {' '.join(wheels)} && " if wheels else ""
    return f"{remove}pip install {keep}"
