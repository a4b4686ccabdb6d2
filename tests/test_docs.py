"""README and docs: short, their links lead somewhere, their code runs, and the site is built without a warning."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.photos import write_pairs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = ("bench", "export", "run", "serve", "train")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    mark: str
    """What the comment above it says."""
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"(?:<!-- ([^\n]*) -->\n)?^( *)```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(page, line, found[3], found[1] or "", re.sub(f"^{found[2]}", "", found[4], flags=re.MULTILINE))


BLOCKS = [block for page in PAGES for block in blocks(page)]


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """Without code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """As both the forge and the site make them of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.is_file(), target
            assert not anchor or anchor in anchors(there), target


def test_readme_is_short_and_names_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"(docs/{page.name}" in text


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    (folder / "photos").mkdir()
    for name in ("blurry.jpg", "photos/one.png", "photos/two.jpg"):
        assert cv2.imwrite(str(folder / name), image)
    return folder


@pytest.mark.parametrize("page", dict.fromkeys(b.page for b in BLOCKS if b.language == "python"), ids=relative)
def test_python_runs_as_it_stands(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    names: dict[str, object] = {"__name__": "docs"}
    for block in blocks(page):
        if block.language == "python" and not block.mark.startswith("not run: "):
            # The lines of the page, so that a traceback names them.
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)


def lines_of(block: Block) -> Iterator[list[str]]:
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;|\|", line):
            words = shlex.split(part, comments=True)
            if words and words[0] in {f"deblur-{name}" for name in COMMANDS}:
                yield words


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "sh"], ids=str)
def test_every_command_line_is_one_that_the_command_takes(block, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    for name, *arguments in lines_of(block):
        module = importlib.import_module(f"deblur_deploy.cli.{name.removeprefix('deblur-')}")
        module.parse(arguments)


SHORTER = {
    "deblur-export": "--pairs few --calibration few/blur --int8.method minmax --int8.rounding nearest --int8.tiles 4 "
    "--int8.tile-px 64 --int8.sensitivity-crops 0 --int8.max-drop-db 3 "
    "--int8.max-image-drop-db 9 --verify.providers cpu --verify.rounds 1 --verify.width-px 64 --verify.height-px 48",
    "deblur-bench": "--data few --variants int8 --providers cpu --sizes 64x48 --budget-s 1",
}
"""What is added to commands that take minutes, so that they only take seconds."""


def path_of_a_newcomer() -> Iterator[str]:
    """Every line of README and of Getting started that is meant to be run, and their Python, in order."""
    for page in (ROOT / "README.md", ROOT / "docs" / "getting-started.md"):
        for block in blocks(page):
            if block.language == "python":
                yield f"python -c {shlex.quote(block.text)}"
            elif block.language == "sh" and block.mark != "test" and not block.mark.startswith("not run: "):
                lines = block.text.replace("\\\n", " ").splitlines()
                yield from (line for line in lines if line and not line.startswith(("#", "pip install ")))


@pytest.mark.slow
def test_the_path_of_a_newcomer_works_as_it_is_written(workplace, tmp_path):
    if not all(shutil.which(f"deblur-{name}") for name in ("bench", "export", "run")):
        pytest.skip("the commands are not on PATH; pip install -e '.[test]'")
    place = shutil.copytree(workplace, tmp_path / "place")
    write_pairs(place / "few", 2)
    environment = {**os.environ, "DEBLUR_CACHE": str(tmp_path / "cache")}
    lines = list(path_of_a_newcomer())
    assert [line.split()[0] for line in lines].count("deblur-export") == 2
    for line in lines:
        command = f"{line} {SHORTER.get(line.split()[0], '')}"
        done = subprocess.run(["bash", "-c", command], cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    made = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert made > {"sharp.png", "restored/one.png", "restored/two.jpg", "bundle/bundle.json", "bench.html"}


def test_every_command_in_a_table_is_one_that_the_command_takes():
    for page in PAGES:
        for text in re.findall(r"^\| `(deblur-[^`]+)` ", page.read_text(encoding="utf-8"), re.MULTILINE):
            name, *arguments = shlex.split(text)
            if arguments:
                importlib.import_module(f"deblur_deploy.cli.{name.removeprefix('deblur-')}").parse(arguments)


def test_the_marked_commands_of_readme_are_these():
    marked = {block.mark: block.text for block in blocks(ROOT / "README.md") if block.mark}
    assert list(marked) == ["run", "test"]
    assert marked["run"] == 'pip install -c constraints.txt -e ".[cpu,export]"\ndeblur-export --out bundle\n'
    assert "pytest" in marked["test"]


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'deblur-deploy[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in (
        "DeblurEngine.receipt",
        "DeblurEngine.float_receipt",
        "MemoryLimitError",
        "max_image_drop_db",
        "build_bundle",
    ):
        assert name in api
