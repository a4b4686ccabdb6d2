"""README's block, the pages of docs/benchmarks, the figures and report.html, as texts made from records."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import msgspec
from common import files_of
from summary import int8_sentence, machines_table, quality_sentence, short_table, times_faster
from tables import (
    AT,
    at_one_size,
    networks_table,
    one_thread_table,
    other_figures,
    other_tables,
    peers_table,
    product_table,
    scaling_tables,
    sets_table,
    shares_table,
)

from deblur_deploy.evaluation import plots, views
from deblur_deploy.evaluation.page import Figure, Page, Picture, Table
from deblur_deploy.evaluation.record import Record, Row
from deblur_deploy.evaluation.sets import with_quality
from deblur_deploy.files import sha256
from deblur_deploy.shipped import DEFAULT_BUNDLE, DEFAULT_CHECKPOINT

Records = dict[str, Record]
"""Of one machine, by the benchmark's name."""

FIGURES = {
    "pareto": ("Quality against latency", "What nothing else beats in both is joined by the line."),
    "latency": ("Latency by size", "uint8 array to uint8 array."),
    "shares": ("Share of what the machine can do", "Operations a second, against the best matrix product measured."),
}
EARLIER = "an earlier export: the same network, other weights"
OURS = ("cpu", "openvino", "cuda")
OWN = {"latency", "quality", "peers", "limits", "scaling"}
"""Benchmarks with tables of their own; of the others everything is shown as it comes."""


def readme_block(records: Records, sizes: dict[str, int], larger: Record | None = None) -> str:
    """The short table and three sentences; ``sizes`` are the bytes of each variant's file.

    ``larger``: the quality of the preset of that name.
    """
    where = f"Measured on {processor(records['latency'])}, {threads(records['latency'])} threads."
    where += f" Times are of {EARLIER}." if is_earlier(records["latency"]) else ""
    sentences = [
        quality_sentence(records["quality"], "docs/benchmarks/main.md", larger),
        times_faster(records["peers"], "docs/benchmarks/index.md") if "peers" in records else "",
        int8_sentence(records["quality"], "docs/int8.md"),
    ]
    table = replace(short_table(merged(records), sizes), note="")
    return "\n\n".join([_grid(table), where, "\n".join(f"- {text}" for text in sentences if text)])


def index_block(machines: dict[str, Records]) -> str:
    """One line a machine, with a link to its page."""
    described = {name: processor(records["latency"]) for name, records in machines.items()}
    table = machines_table(machines, described)
    return f"{_grid(table)}\n\n{table.note}"


def machine_page(name: str, records: Records) -> str:
    """Everything that was measured on one machine."""
    parts = [
        f"# {processor(records['latency'])}",
        "<!-- Made by benchmarks/report.py from the records in benchmarks/results. -->",
        conditions(records["latency"]),
    ]
    parts += [f"![{FIGURES[figure][0]}]({name}-{figure}.svg)\n\n{FIGURES[figure][1]}" for figure in figures(records)]
    shown = machine_tables(records)
    parts += map(_section, shown)
    if "peers" in records and (claim := times_faster(records["peers"])):
        place = next(at for at, part in enumerate(parts) if part.startswith("## Beside other tools"))
        parts.insert(place + 1, claim)
    parts += ["## Conditions and notes", "\n".join(f"- {note}" for note in _notes(records))]
    return "\n\n".join(parts) + "\n"


def machine_tables(records: Records) -> list[Table]:
    """All tables of one machine, in the order in which people ask."""
    found = [product_table(merged(records), records.get("limits"))]
    if (alone := one_thread_table(records["latency"])) is not None:
        found.append(alone)
    if "quality" in records and (by_set := sets_table(records["quality"])) is not None:
        found.append(_placed(by_set, records["quality"], records["latency"]))
    if "peers" in records:
        found.append(peers_table(records["peers"]))
        found += [table for table in (networks_table(records["peers"]),) if table]
    if "limits" in records:
        found.append(shares_table(records["limits"]))
    if "scaling" in records:
        found += scaling_tables(records["scaling"])
    for record in _others(records):
        found += [_placed(table, record, records["latency"]) for table in other_tables(record)]
    return found + views.tables(msgspec.structs.replace(records["latency"], rows=merged(records)))


def _placed(table: Table, record: Record, main: Record) -> Table:
    """``table``, which says on what and where it was measured if the rest of the page was measured otherwise."""
    where = "" if processor(record) == processor(main) else f" Measured on {processor(record)}."
    where += f" Of {EARLIER}." if is_earlier(record) and not is_earlier(main) else ""
    return replace(table, note=f"{table.note}{where}".lstrip())


def _others(records: Records) -> list[Record]:
    return [record for name, record in records.items() if name not in OWN]


def merged(records: Records) -> list[Row]:
    """Rows of the latency record, with the quality of the same variant and provider where it was measured."""
    quality: dict[tuple[str, ...], Row] = {}
    for row in records["quality"].rows if "quality" in records else []:
        # Those of the built-in pairs come first; further sets have a table of their own.
        quality.setdefault(row.key[:3], row)
    timed = records["latency"].rows
    return [with_quality(row, quality[row.key[:3]]) if row.key[:3] in quality else row for row in timed]


def is_earlier(record: Record) -> bool:
    """Whether it was measured on other files than those that ship now; pruning starts from a checkpoint instead."""
    files = record.settings.get("files")
    return files is not None and "checkpoint_sha256" not in record.settings and files != files_of(DEFAULT_BUNDLE)


def conditions(record: Record) -> str:
    """Where and when a record was measured, in one sentence."""
    noise = f"; the machine's own noise was {record.machine_noise:.1%}" if record.machine_noise is not None else ""
    waited = [row.waited for row in record.rows if row.waited is not None]
    noise += f", waiting for other processes took {fmean(waited):.1%} of the timed calls" if waited else ""
    if again := record.found.get("second_pass"):
        noise += f", and a second pass differed by {again['median']:.1%} (median) and {again['worst']:.1%} (most)"
    if again := record.found.get("second_pass_steady"):
        noise += f", without the waiting by {again['median']:.1%} and {again['worst']:.1%}"
    return (
        f"Measured on {processor(record)}, {threads(record)} threads, {record.date[:10]}, commit "
        f"{record.commit or 'unknown'}, onnxruntime {record.versions.get('onnxruntime', 'unknown')}{noise}."
    )


def processor(record: Record) -> str:
    """What a record was measured on."""
    about = record.machine
    return ", ".join([*about.get("gpus", []), f"{about['processor']} ({', '.join(about['instructions'])})"])


def threads(record: Record) -> int:
    """How many threads a record's candidates had."""
    return int(record.settings.get("threads") or record.machine["cores"])


def digest(*records: Records) -> str:
    """SHA-256 of all that a figure or the page is made of."""
    return hashlib.sha256(msgspec.json.encode(records, order="sorted")).hexdigest()


def figures(records: Records) -> dict[str, Callable[[], str]]:
    """What draws each figure that the records allow, as SVG, by name."""
    rows = [row for row in merged(records) if row.error is None]
    found: dict[str, Callable[[], str]] = {}
    if "peers" in records:
        points, psnr_blurred, size = _peers_points(records["peers"])
    else:
        size = "1280x720"
        points, psnr_blurred = views.pareto_points([row for row in rows if row.size == size]), views.blurred(rows)
    if points:
        found["pareto"] = partial(plots.pareto, points, psnr_blurred, size)
    series: dict[str, dict[float, float]] = {}
    for row in rows:
        if row.median_ms is not None:
            series.setdefault(f"{row.variant}, {row.provider}", {})[row.pixels / 1e6] = row.median_ms
    if series:
        found["latency"] = partial(plots.latency_by_size, series)
    if "limits" in records and (shares := records["limits"].found.get("shares")):
        values = {
            f"{row['variant']}, {row['provider']} ({row['arithmetic']})": max(
                row["share_of_compute"], row["share_of_bandwidth"]
            )
            for row in shares
            if row.get("size", AT) == AT
        }
        found["shares"] = partial(plots.shares, values, "share of the measured ceiling, %")
    return found


def _peers_points(peers: Record) -> tuple[list[plots.Point], float | None, str]:
    """Ours and others' on the product's network, the PSNR of what went in, and the size."""
    good = [row for row in at_one_size(peers) if row.error is None and row.model == peers.found["product_model"]]
    ours = [row for row in good if row.provider in OURS]
    named = [msgspec.structs.replace(row, variant=f"{row.variant}, {row.provider}") for row in good]
    points = [
        point
        for group, chosen in (("deblur_deploy", ours), ("other tools", [r for r in good if r not in ours]))
        for point in views.pareto_points([named[good.index(row)] for row in chosen], group)
    ]
    return points, views.blurred(good), good[0].size if good else ""


def results_page(machines: dict[Path, Records], shown: Sequence[Picture]) -> Page:
    """All of ``report.html``; ``machines`` by the folder of their records."""
    drawn: list[Figure] = []
    tables: list[Table] = []
    notes: list[str] = []
    for folder, records in machines.items():
        where = "" if len(machines) == 1 else f" on {processor(records['latency'])}"
        drawn += [
            Figure(heading=FIGURES[name][0] + where, svg=draw(), note=FIGURES[name][1])
            for name, draw in figures(records).items()
        ]
        product, *more = machine_tables(records)
        tables += [replace(product, heading=product.heading + where), *more]
        for record in _others(records):
            drawn += other_figures(record, folder)
        notes += _notes(records)
    notes.append(f"Made from records {digest(*machines.values())}.")
    return Page(
        title="deblur_deploy: latency and quality",
        lead="Every figure comes from a record that a script in benchmarks/ wrote.",
        pictures=shown,
        shown="the variant that runs by default on this machine",
        figures=drawn,
        tables=tables,
        notes=notes,
    )


def _notes(records: Records) -> list[str]:
    notes = []
    for record in records.values():
        notes.append(f"{record.benchmark}: {conditions(record)}")
        notes += [f"{record.benchmark}: {note}" for note in record.notes]
        if is_earlier(record):
            notes.append(f"{record.benchmark}: times and PSNR are of {EARLIER}")
        weights = DEFAULT_CHECKPOINT.with_stem(record.settings.get("checkpoint", DEFAULT_CHECKPOINT.stem))
        measured = record.settings.get("checkpoint_sha256")
        if measured and not (weights.is_file() and sha256(weights) == measured):
            notes.append(f"{record.benchmark}: measured on other weights than those that ship now")
    return notes


def _section(table: Table) -> str:
    return f"## {table.heading}\n\n{_grid(table)}" + (f"\n\n{table.note}" if table.note else "")


def _grid(table: Table) -> str:
    columns = [" ".join(column.split()) for column in table.columns]
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table.rows]
    return "\n".join(lines)
