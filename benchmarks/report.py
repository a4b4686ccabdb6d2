"""Do README, docs/benchmarks, the figures and report.html say what the records in ``benchmarks/results`` say?

Without ``--check`` all of them are written anew.  Nothing is measured here but the pictures.  How each is made of
records is in ``pages.py``, the tables are in ``tables.py``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import RESULTS, pairs, script
from common import Options as _Options
from pages import FIGURES, Records, digest, figures, index_block, is_earlier, machine_page, readme_block, results_page
from rich.console import Console

from deblur_deploy.bundles.manifest import Bundle
from deblur_deploy.cli.common import OK, SOME_FAILED
from deblur_deploy.errors import InputError
from deblur_deploy.evaluation import plots
from deblur_deploy.evaluation.page import Picture, pictures_of, write_page
from deblur_deploy.evaluation.record import read_record
from deblur_deploy.files import existing, writing_file
from deblur_deploy.media.images import Image, list_images, read_image, write_image
from deblur_deploy.runtime.engine import DeblurEngine

BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
NAMES = ("latency", "quality", "peers", "limits", "scaling")
OTHERS = (
    "pruning", "pruning-article", "quantization", "engine", "video", "robustness", "soak", "training", "serving",
    "cluster", "networks",
)  # fmt: skip
"""Records that are shown as they come: ``found`` may hold ``tables`` (heading, columns, rows of texts, note) and
``points`` (label, group, milliseconds, psnr) to plot; the page shows NAME_*.svg beside it too."""
MAIN = "main"
"""Page of the records that lie in no subfolder."""


@dataclass(frozen=True, kw_only=True)
class Report(_Options):
    """Write README's table, the pages of benchmarks, the figures and report.html, or check them."""

    readme: Path = RESULTS.parents[1] / "README.md"
    """File whose text between the two markers is replaced."""
    docs: Path = RESULTS.parents[1] / "docs" / "benchmarks"
    """Folder of one page a machine, and of index.md, whose text between the markers is replaced."""
    results: Path = RESULTS
    """Folder of records; its subfolders may hold those of other machines."""
    photos: Path | None = None
    """Folder of blurred photographs to show on the page beside the built-in ones."""
    check: bool = False
    """Write nothing; exit status 1 if anything disagrees with the records."""


def run(options: Report) -> int:
    """Write or check."""
    machines = read_machines(options.results, quick=options.quick)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if options.check:
        wrong = stale(options, machines)
        for line in wrong:
            console.print(f"report.py: {line}")
        return SOME_FAILED if wrong else OK
    for path, text in texts(options, machines).items():
        _write(path, text)
    for path, (name, records) in drawings(options, machines).items():
        _write(path, plots.for_file(_signed(figures(records)[name](), records)))
    for path in leftovers(options, machines):
        path.unlink()
    write_image(options.out / "before_after.jpg", before_after(options))
    write_page(options.out / "report.html", results_page(machines, pictures(options)))
    console.print(f"written: {options.readme}, {options.docs}, {options.out / 'report.html'}")
    sys.stdout.write(json.dumps({"machines": len(machines), "records": digest(*machines.values())}) + "\n")
    return OK


def read_machines(folder: Path, *, quick: bool = False) -> dict[Path, Records]:
    """Records by folder and name: the main machine's, and in subfolders those of others.

    Raises InputError if the main machine has no records of latency and quality, if a record comes from a quick run and
    ``quick`` is not set, or if records that stand side by side are of different files.
    """
    found: dict[Path, Records] = {}
    for place in (folder, *sorted(path for path in existing(folder, kind="folder").iterdir() if path.is_dir())):
        names = [name for name in (*NAMES, *OTHERS) if (place / f"{name}.json").is_file()]
        records = {name: read_record(place / f"{name}.json") for name in names}
        if "latency" not in records or (place == folder and "quality" not in records):
            continue
        for name, record in records.items():
            if record.settings.get("quick") and not quick:
                raise InputError(f"{place / name}.json was measured with --quick; measure it again without")
            # Training knows no files, pruning names its checkpoint, and memory over a long time is the same with any
            # weights.  Others may be of what ships now where the times are not yet: their notes say which.
            files = record.settings.get("files")
            free = name.startswith(("pruning", "soak")) or not is_earlier(record)
            if not free and files and files != records["latency"].settings.get("files"):
                raise InputError(f"{place / name}.json is of other files than latency.json beside it; measure again")
        found[place] = records
    if folder not in found:
        raise InputError(f"{folder} holds no latency.json and quality.json; run benchmarks/latency.py and quality.py")
    return found


def named(machines: dict[Path, Records]) -> dict[str, Records]:
    """The same by the name of the page; the first is the machine that README's figures are of."""
    main, *others = machines
    return {MAIN: machines[main]} | {folder.name: machines[folder] for folder in others}


def texts(options: Report, machines: dict[Path, Records]) -> dict[Path, str]:
    """Every file of text that is made of records alone."""
    pages = named(machines)
    sizes = {name: variant.path.stat().st_size for name, variant in Bundle.read(options.model).variants.items()}
    larger = options.results / "quality" / "quality.json"
    main = readme_block(pages[MAIN], sizes, read_record(larger) if larger.is_file() else None)
    index = options.docs / "index.md"
    return {
        options.readme: splice(options.readme, main),
        index: splice(index, index_block(pages)),
        **{options.docs / f"{name}.md": machine_page(name, records) for name, records in pages.items()},
    }


def drawings(options: Report, machines: dict[Path, Records]) -> dict[Path, tuple[str, Records]]:
    """Every figure's file, with its name and what it is drawn from."""
    return {
        options.docs / f"{page}-{name}.svg": (name, records)
        for page, records in named(machines).items()
        for name in figures(records)
    }


def leftovers(options: Report, machines: dict[Path, Records]) -> list[Path]:
    """Pages and figures of machines, or of figures, that are no more."""
    wanted = {*texts(options, machines), *drawings(options, machines)}
    drawn = (path for name in FIGURES for path in options.docs.glob(f"*-{name}.svg"))
    return sorted({*options.docs.glob("*.md"), *drawn} - wanted)


def splice(path: Path, block: str) -> str:
    """The text of ``path`` with ``block`` between the markers; raises InputError if they are not there in order."""
    before, begin, rest = existing(path, kind="file").read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise InputError(f"{path} needs the lines {BEGIN} and {END}, once each and in this order")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def stale(options: Report, machines: dict[Path, Records]) -> list[str]:
    """What does not agree with the records: README's part, a page, or a figure."""
    wrong = [
        f"{path} does not agree with the records; run benchmarks/report.py"
        for path, text in texts(options, machines).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    made = {path: digest(records) for path, (_, records) in drawings(options, machines).items()}
    made[options.results / "report.html"] = digest(*machines.values())
    for path, records_digest in made.items():
        if not path.is_file() or records_digest not in path.read_text(encoding="utf-8"):
            wrong.append(f"{path} was not made from the records; run benchmarks/report.py")
    return wrong + [f"{path} is of no record; run benchmarks/report.py" for path in leftovers(options, machines)]


def pictures(options: Report) -> list[Picture]:
    """The built-in pairs and ``--photos``, restored by the variant that ``auto`` runs on this machine."""
    with DeblurEngine(options.model, threads=options.threads) as engine:
        found = pictures_of(pairs(options), engine, count=6)
        for path in list_images(options.photos) if options.photos else []:
            photo = read_image(path)
            found.append(Picture(before=photo, after=engine(photo), caption=f"{path.stem} (no ground truth)"))
    return found


def before_after(options: Report, side: int = 300) -> Image:
    """README's picture: crops of three built-in photographs; rows are blurred, restored, ground truth."""
    chosen = pairs(options)[:: 3 - 2 * options.quick][:3]
    with DeblurEngine(options.model, threads=options.threads) as engine:
        columns = []
        for pair in chosen:
            top, left = ((length - side) // 2 for length in pair.sharp.shape[:2])
            inside = slice(top, top + side), slice(left, left + side)
            columns.append(np.vstack([image[inside] for image in (pair.blurred, engine(pair.blurred), pair.sharp)]))
    return np.hstack(columns)


def _signed(svg: str, records: Records) -> str:
    head, closing, rest = svg.partition(">")
    return f"{head}{closing}<desc>Made by benchmarks/report.py from records {digest(records)}</desc>{rest}"


def _write(path: Path, text: str) -> None:
    with writing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    script(Report, run)
