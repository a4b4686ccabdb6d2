"""Blur/sharp pairs in the layouts that people have them in, found and matched by name; nothing is decoded here."""

from __future__ import annotations

import csv
from pathlib import Path

from deblur_deploy.errors import InputError
from deblur_deploy.files import existing
from deblur_deploy.media.images import list_images

SHARP = "sharp"
BLURRED = ("blur", "blur_gamma")
LAYOUTS = "sharp/NAME beside blur/NAME or blur_gamma/NAME, at any depth, or a CSV file with the columns blur and sharp"

PathPair = tuple[Path, Path]
"""(blurred, sharp)"""


def holds_pairs(path: Path) -> bool:
    """Whether ``path`` is a CSV file, or a folder with one of the layouts of ``find_pairs`` inside."""
    return path.suffix.lower() == ".csv" or (path.is_dir() and bool(_folders(path)))


def find_pairs(path: Path) -> list[PathPair]:
    """All pairs at ``path``, sorted: GoPro's ``*/blur``, ``*/blur_gamma`` and ``*/sharp``, the flat form, or a CSV.

    A CSV has two columns, blurred then sharp, relative to the file, unless its first row names them otherwise.
    Raises MissingFileError if nothing is there, InputError if no pair is, or names the image without a partner.
    """
    pairs, failed = match_pairs(path)
    if failed:
        more = f" (and {len(failed) - 1} more such)" if len(failed) > 1 else ""
        raise InputError(f"{failed[0]}{more}")
    return pairs


def match_pairs(path: Path) -> tuple[list[PathPair], list[str]]:
    """The pairs that ``find_pairs`` finds, and one line for each image or line of a CSV that has no partner.

    Raises MissingFileError if nothing is there, InputError if there are neither pairs nor such lines.
    """
    if path.suffix.lower() == ".csv":
        return _listed(existing(path, kind="file"))
    pairs: list[PathPair] = []
    failed: list[str] = []
    for blurred_folder, sharp_folder in _folders(existing(path, kind="folder")):
        blurred, sharp = (_by_stem(folder, failed) for folder in (blurred_folder, sharp_folder))
        for names, others, missing in ((blurred, sharp, sharp_folder), (sharp, blurred, blurred_folder)):
            failed += [
                f"{names[name]} has no partner in {missing}; pairs share their file name"
                for name in sorted(names.keys() - others.keys())
            ]
        pairs += [(blurred[name], sharp[name]) for name in sorted(blurred.keys() & sharp.keys())]
    if not pairs and not failed:
        raise InputError(f"no pairs in {path}; wanted: {LAYOUTS}")
    return pairs, failed


def _by_stem(folder: Path, failed: list[str]) -> dict[str, Path]:
    """The images of a folder by the name that pairs share; what has the name of another goes to ``failed``."""
    found: dict[str, Path] = {}
    for image in list_images(folder):
        if image.stem in found:
            failed.append(f"{image} and {found[image.stem].name} share a name, so that nobody knows which is meant")
        found.setdefault(image.stem, image)
    return found


def _folders(path: Path) -> list[tuple[Path, Path]]:
    sharp_folders = sorted({path / SHARP, *path.rglob(SHARP)})
    candidates = [(folder.parent / name, folder) for folder in sharp_folders for name in BLURRED]
    return [(blurred, sharp) for blurred, sharp in candidates if blurred.is_dir() and sharp.is_dir()]


def _listed(path: Path) -> tuple[list[PathPair], list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [(number, [cell.strip() for cell in row]) for number, row in enumerate(csv.reader(file), 1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file ({error}); wanted: {LAYOUTS}") from None
    order = (0, 1)
    if rows and {"blur", "sharp"} <= set(header := [cell.lower() for cell in rows[0][1]]):
        order = header.index("blur"), header.index("sharp")
        rows = rows[1:]
    pairs: list[PathPair] = []
    failed: list[str] = []
    for number, row in rows:
        where = f"{path}, line {number}"
        if len(row) <= max(order):
            failed.append(f"{where}: {len(row)} columns; two are needed, blurred and sharp")
            continue
        pair = path.parent / row[order[0]], path.parent / row[order[1]]
        try:
            missing = [image for image in pair if not image.is_file()]
        except OSError as error:  # a cell that is no path at all
            failed.append(f"{where}: {error.strerror}: {str(error.filename)[:80]}")
            continue
        if missing:
            failed.append(f"{where}: no such file: {missing[0]}; paths are relative to the CSV file")
        else:
            pairs.append(pair)
    if not pairs and not failed:
        raise InputError(f"{path} lists no pairs; wanted: {LAYOUTS}")
    return pairs, failed
