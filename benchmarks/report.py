"""README's table, the figures, and one self-contained page, all made from the records in ``benchmarks/results``.

Nothing is measured here but the pictures of the page.  ``--check`` only says whether README agrees with the records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import msgspec
import numpy as np
from common import RESULTS, pairs, script
from common import Options as _Options
from rich.console import Console
from tables import (
    networks_table,
    other_figures,
    other_tables,
    peers_table,
    product_table,
    scaling_tables,
    sets_table,
    shares_table,
    times_faster,
)

from deblur_deploy.cli.common import OK, SOME_FAILED
from deblur_deploy.errors import InputError
from deblur_deploy.evaluation import plots, views
from deblur_deploy.evaluation.page import Figure, Page, Picture, Table, pictures_of, write_page
from deblur_deploy.evaluation.record import Record, Row, read_record
from deblur_deploy.evaluation.sets import with_quality
from deblur_deploy.files import existing, sha256, writing_file
from deblur_deploy.media.images import Image, list_images, read_image, write_image
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.shipped import DEFAULT_CHECKPOINT

BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
NAMES = ("latency", "quality", "peers", "limits", "scaling")
OTHERS = ("pruning", "pruning-article", "quantization", "engine", "training")
"""Records that are shown as they come: ``found`` may hold ``tables`` (heading, columns, rows of texts, note), of which
README shows the first, and ``points`` (label, group, milliseconds, psnr) to plot; NAME_*.svg beside it is shown too."""
FIGURES = {
    "pareto": ("Quality against latency", "What nothing else beats in both is joined by the line."),
    "latency": ("Latency by size", "uint8 array to uint8 array."),
    "shares": ("Share of what the machine can do", "Operations a second, against the best matrix product measured."),
}
OURS = ("cpu", "openvino", "cuda")


@dataclass(frozen=True, kw_only=True)
class Report(_Options):
    """Write README's table, the figures and the page."""

    readme: Path = RESULTS.parents[1] / "README.md"
    """File whose text between the two markers is replaced."""
    results: Path = RESULTS
    """Folder of records; its subfolders may hold those of other machines."""
    photos: Path | None = None
    """Folder of blurred photographs to show on the page beside the built-in ones."""
    check: bool = False
    """Write nothing; exit status 1 if README or a figure disagrees with the records."""


def run(options: Report) -> int:
    """Write or check."""
    machines = read_machines(options.results, quick=options.quick)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if options.check:
        wrong = stale(options.readme, machines)
        for line in wrong:
            console.print(f"report.py: {line}")
        return SOME_FAILED if wrong else OK
    readme = existing(options.readme, kind="file").read_text(encoding="utf-8")
    _write(options.readme, splice(readme, markdown(machines, options.readme)))
    folder, records = main_machine(machines)
    for name, svg in figures(records).items():
        _write(folder / f"{name}.svg", plots.for_file(_signed(svg, records)))
    write_image(options.out / "before_after.jpg", before_after(options))
    page = results_page(machines, pictures(options))
    write_page(options.out / "report.html", page)
    console.print(f"written: {options.readme}, {options.out / 'report.html'}")
    return OK


def read_machines(folder: Path, *, quick: bool = False) -> dict[Path, dict[str, Record]]:
    """Records by folder and name: the main machine's, and in subfolders those of others.

    Raises InputError if the main machine has no records of latency and quality, if a record comes from a quick run and
    ``quick`` is not set, or if records that stand side by side are of different files.
    """
    found: dict[Path, dict[str, Record]] = {}
    for place in (folder, *sorted(path for path in existing(folder, kind="folder").iterdir() if path.is_dir())):
        names = [name for name in (*NAMES, *OTHERS) if (place / f"{name}.json").is_file()]
        records = {name: read_record(place / f"{name}.json") for name in names}
        if "latency" not in records or (place == folder and "quality" not in records):
            continue
        for name, record in records.items():
            if record.settings.get("quick") and not quick:
                raise InputError(f"{place / name}.json was measured with --quick; measure it again without")
            # Training knows no files, and pruning starts from a checkpoint, which its record names.
            files = record.settings.get("files")
            if not name.startswith("pruning") and files and files != records["latency"].settings.get("files"):
                raise InputError(f"{place / name}.json is of other files than latency.json beside it; measure again")
        found[place] = records
    if folder not in found:
        raise InputError(f"{folder} holds no latency.json and quality.json; run benchmarks/latency.py and quality.py")
    return found


def main_machine(machines: dict[Path, dict[str, Record]]) -> tuple[Path, dict[str, Record]]:
    """Folder and records of the machine that README's figures are of."""
    return next(iter(machines.items()))


def merged(records: dict[str, Record]) -> list[Row]:
    """Rows of the latency record, with the quality of the same variant and provider where it was measured."""
    quality: dict[tuple[str, ...], Row] = {}
    for row in records["quality"].rows if "quality" in records else []:
        # Those of the built-in pairs come first; further sets have a table of their own.
        quality.setdefault(row.key[:3], row)
    timed = records["latency"].rows
    return [with_quality(row, quality[row.key[:3]]) if row.key[:3] in quality else row for row in timed]


def markdown(machines: dict[Path, dict[str, Record]], readme: Path) -> str:
    """What stands between the markers: everything of the main machine; of the others the product and its peers."""
    parts = [_product_and_peers(records) for records in machines.values()]
    folder, records = main_machine(machines)
    main = []
    for name in OTHERS:
        if name in records and "tables" in records[name].found:
            main += map(_markdown_table, other_tables(records[name])[:1])
            main += [conditions(records[name])] if _elsewhere(records[name], records["latency"]) else []
    where = folder.resolve().relative_to(readme.resolve().parent).as_posix()
    main.append("\n".join(f"![{FIGURES[name][0]}]({where}/{name}.svg)" for name in figures(records)))
    parts[1:1] = main
    return "\n\n".join(part for part in parts if part)


def _product_and_peers(records: dict[str, Record]) -> str:
    parts = [conditions(records["latency"]), _markdown_table(product_table(merged(records), records.get("limits")))]
    if "peers" in records:
        parts += [_markdown_table(peers_table(records["peers"])), times_faster(records["peers"])]
    return "\n\n".join(part for part in parts if part)


def _elsewhere(record: Record, main: Record) -> bool:
    """Whether ``record`` is of another machine, or of another state of the shipped files, than ``main``."""
    return record.machine != main.machine or record.settings.get("files") != main.settings.get("files")


def conditions(record: Record) -> str:
    """Where and when a record was measured, in one sentence."""
    noise = f"; the machine's own noise was {record.machine_noise:.1%}" if record.machine_noise is not None else ""
    waited = [row.waited for row in record.rows if row.waited is not None]
    noise += f", waiting for other processes took {fmean(waited):.1%} of the timed calls" if waited else ""
    if again := record.found.get("second_pass"):
        noise += f", and a second pass differed by {again['median']:.1%} (median) and {again['worst']:.1%} (most)"
    if again := record.found.get("second_pass_steady"):
        noise += f", without the waiting by {again['median']:.1%} and {again['worst']:.1%}"
    threads = record.settings.get("threads") or record.machine["cores"]
    return (
        f"Measured on {processor(record)}, {threads} threads, {record.date[:10]}, commit {record.commit or 'unknown'}, "
        f"onnxruntime {record.versions.get('onnxruntime', 'unknown')}{noise}."
    )


def processor(record: Record) -> str:
    """What a record was measured on."""
    about = record.machine
    return ", ".join([*about.get("gpus", []), f"{about['processor']} ({', '.join(about['instructions'])})"])


def splice(readme: str, block: str) -> str:
    """``readme`` with ``block`` between the markers; raises InputError if they are not there, once and in order."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise InputError(f"README needs the lines {BEGIN} and {END}, once each and in this order")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def stale(readme: Path, machines: dict[Path, dict[str, Record]]) -> list[str]:
    """What does not agree with the records: README's part, or a figure."""
    text = existing(readme, kind="file").read_text(encoding="utf-8")
    wrong = []
    if splice(text, markdown(machines, readme)) != text:
        wrong.append(f"{readme} does not agree with the records; run benchmarks/report.py")
    folder, records = main_machine(machines)
    made = {folder / f"{name}.svg": digest(records) for name in figures(records)}
    made[folder / "report.html"] = digest(*machines.values())
    for path, records_digest in made.items():
        if not path.is_file() or records_digest not in path.read_text(encoding="utf-8"):
            wrong.append(f"{path} was not made from the records beside it; run benchmarks/report.py")
    return wrong


def digest(*records: dict[str, Record]) -> str:
    """SHA-256 of all that a figure or the page is made of."""
    return hashlib.sha256(msgspec.json.encode(records, order="sorted")).hexdigest()


def figures(records: dict[str, Record]) -> dict[str, str]:
    """SVG by name, of what the records allow."""
    rows = [row for row in merged(records) if row.error is None]
    found: dict[str, str] = {}
    if "peers" in records:
        peers = records["peers"]
        good = [row for row in peers.rows if row.error is None and row.model == peers.found["product_model"]]
        ours = [row for row in good if row.provider in OURS]
        named = [msgspec.structs.replace(row, variant=f"{row.variant}, {row.provider}") for row in good]
        points = [
            point
            for group, chosen in (("deblur_deploy", ours), ("other tools", [r for r in good if r not in ours]))
            for point in views.pareto_points([named[good.index(row)] for row in chosen], group)
        ]
        size, psnr_blurred = good[0].size if good else "", views.blurred(good)
    else:
        size = "1280x720"
        points, psnr_blurred = views.pareto_points([row for row in rows if row.size == size]), views.blurred(rows)
    if points:
        found["pareto"] = plots.pareto(points, psnr_blurred, size)
    series: dict[str, dict[float, float]] = {}
    for row in rows:
        if row.median_ms is not None:
            series.setdefault(f"{row.variant}, {row.provider}", {})[row.pixels / 1e6] = row.median_ms
    if series:
        found["latency"] = plots.latency_by_size(series)
    if "limits" in records and (shares := records["limits"].found.get("shares")):
        values = {
            f"{row['variant']}, {row['provider']} ({row['arithmetic']})": max(
                row["share_of_compute"], row["share_of_bandwidth"]
            )
            for row in shares
        }
        found["shares"] = plots.shares(values, "share of the measured ceiling, %")
    return found


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


def results_page(machines: dict[Path, dict[str, Record]], shown: Sequence[Picture]) -> Page:
    """The whole page."""
    drawn: list[Figure] = []
    tables: list[Table] = []
    notes: list[str] = []
    for folder, records in machines.items():
        where = "" if len(machines) == 1 else f" on {processor(records['latency'])}"
        drawn += [
            Figure(heading=FIGURES[name][0] + where, svg=svg, note=FIGURES[name][1])
            for name, svg in figures(records).items()
        ]
        product = product_table(merged(records), records.get("limits"))
        tables.append(replace(product, heading=product.heading + where))
        if "quality" in records and (by_set := sets_table(records["quality"])) is not None:
            tables.append(by_set)
        if "peers" in records:
            tables.append(peers_table(records["peers"]))
            tables += [table for table in (networks_table(records["peers"]),) if table]
        if "limits" in records:
            tables.append(shares_table(records["limits"]))
        if "scaling" in records:
            tables += scaling_tables(records["scaling"])
        for name in OTHERS:
            if name in records:
                drawn += other_figures(records[name], folder)
                tables += other_tables(records[name])
        tables += views.tables(msgspec.structs.replace(records["latency"], rows=merged(records)))
        for record in records.values():
            notes.append(f"{record.benchmark}: {conditions(record)}")
            notes += [f"{record.benchmark}: {note}" for note in record.notes]
            weights = DEFAULT_CHECKPOINT.with_stem(record.settings.get("checkpoint", DEFAULT_CHECKPOINT.stem))
            measured = record.settings.get("checkpoint_sha256")
            if measured and not (weights.is_file() and sha256(weights) == measured):
                notes.append(f"{record.benchmark}: measured on other weights than those that ship now")
    notes.append(f"Made from records {digest(*machines.values())}.")
    lead = "Every figure comes from a record that a script in benchmarks/ wrote."
    return Page(
        title="deblur_deploy: latency and quality",
        lead=lead,
        pictures=shown,
        shown="the variant that runs by default on this machine",
        figures=drawn,
        tables=tables,
        notes=notes,
    )


def _markdown_table(table: Table) -> str:
    columns = [" ".join(column.split()) for column in table.columns]
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table.rows]
    return f"**{table.heading}**\n\n" + "\n".join(lines) + (f"\n\n{table.note}" if table.note else "")


def _signed(svg: str, records: dict[str, Record]) -> str:
    head, closing, rest = svg.partition(">")
    return f"{head}{closing}<desc>Made by benchmarks/report.py from records {digest(records)}</desc>{rest}"


def _write(path: Path, text: str) -> None:
    with writing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    script(Report, run)
