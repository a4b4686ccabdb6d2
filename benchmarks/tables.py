"""The tables of the report, as text made from records."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import services

from deblur_deploy.evaluation import plots
from deblur_deploy.evaluation.page import Figure, Table
from deblur_deploy.evaluation.plots import Point
from deblur_deploy.evaluation.record import Record, Row
from deblur_deploy.evaluation.views import blurred, digits, number, one_a_variant, quality_lines, without_empty

AT = "1280x720"


def product_table(rows: Sequence[Row], limits: Record | None) -> Table:
    """One line a variant and provider: latency at every size, memory, quality and the share of the ceiling."""
    sizes = list(dict.fromkeys(row.size for row in rows))
    by_key = {row.key: row for row in rows}
    at_size = [row for row in limits.found["shares"] if row.get("size", AT) == AT] if limits else []
    shares = {(row["variant"], row["provider"]): row for row in at_size}
    lines = []
    for row in one_a_variant(rows):
        timed = [by_key.get((*row.key[:3], size)) for size in sizes]
        at = by_key.get((*row.key[:3], AT), row)
        share = shares.get((row.variant, row.provider))
        lines.append(
            [
                row.variant,
                ran(row) if row.error is None else f"{row.provider}: failed",
                *("failed" if each is None or each.error else digits(each.median_ms) for each in timed),
                digits(at.frames_per_s),
                number(at.peak_mb, ".0f"),
                number(at.gpu_mb, ".0f"),
                number(row.psnr, ".2f"),
                number(None if row.psnr is None or row.psnr_blurred is None else row.psnr - row.psnr_blurred, "+.2f"),
                number(row.ssim, ".4f"),
                number(row.psnr_to_fp32, ".1f"),
                *([_share(share)] if limits else []),
            ]
        )
    columns = ["variant", "ran on", *(f"{size}, ms" for size in sizes), f"fps at {AT}", "peak MB", "GPU MB"]
    columns += ["PSNR, dB", "gain, dB", "SSIM", "to fp32, dB", *(["of the ceiling"] if limits else [])]
    note = "Median latency from a uint8 array to a uint8 array; peak memory of a process that does nothing else"
    if (psnr_blurred := blurred(rows)) is not None:
        note += f"; PSNR and SSIM on the built-in pairs, whose blurred images have {number(psnr_blurred, '.2f')} dB"
    columns, lines = without_empty(columns, lines)
    return Table(heading="The shipped variants", columns=columns, rows=lines, note=note + ".")


def one_thread_table(record: Record) -> Table | None:
    """Every variant with one thread, or None if that was not measured."""
    found: list[dict[str, Any]] = record.found.get("one_thread", [])
    lines = [
        [
            row["variant"],
            row["provider"],
            digits(row["median_ms"]) if row["error"] is None else "failed",
            ", ".join(name for name in ("chosen", "fastest") if row[name]),
        ]
        for row in found
    ]
    note = "Of each provider: what the engine takes by itself, and what is fastest of that which it may take."
    columns = ["variant", "provider", f"{AT}, ms", "of its provider"]
    return Table(heading="One thread", columns=columns, rows=lines, note=note) if lines else None


def at_one_size(record: Record) -> list[Row]:
    """Rows at 1280x720, or at the first size of the record where that is not among them."""
    sizes = list(dict.fromkeys(row.size for row in record.rows))
    wanted = AT if AT in sizes else sizes[0]
    return [row for row in record.rows if row.size == wanted]


def peers_table(record: Record) -> Table:
    """What took turns on the product's own network, fastest first."""
    network = record.found["product_model"]
    rows = [row for row in at_one_size(record) if row.model == network]
    rows.sort(key=lambda row: row.median_ms or float("inf"))
    fastest = rows[0].median_ms
    lines = [
        [
            row.variant,
            _run_by(row),
            digits(row.median_ms) if row.error is None else "failed",
            number(row.noise, ".1%"),
            number(row.median_ms / fastest if row.median_ms and fastest else None, ".2f"),
            number(row.peak_mb, ".0f"),
            number(row.gpu_mb, ".0f"),
            digits(row.load_ms),
            digits(row.first_ms),
            number(row.psnr, ".2f"),
            number(row.psnr_to_fp32, ".1f"),
        ]
        for row in rows
    ]
    size = rows[0].size
    columns = ["network in", "run by", f"{size}, ms", "±", "times the fastest", "peak MB", "GPU MB"]
    columns += ["load, ms", "first, ms", "PSNR, dB", "to fp32, dB"]
    note = f"The same weights, threads and run; PSNR on {record.settings['data']}; settings of each are in peers.json."
    columns, lines = without_empty(columns, lines)
    return Table(heading="Beside other tools", columns=columns, rows=lines, note=note)


def networks_table(record: Record) -> Table | None:
    """The same candidates on every network of the run, a column each, or None if there was but one."""
    networks: dict[str, dict[str, Any]] = record.found.get("networks", {})
    if len(networks) < 2:
        return None
    rows = at_one_size(record)
    times = {(row.variant, _run_by(row), row.model): row for row in rows}
    first = next(iter(networks))

    def cell(who: tuple[str, str], network: str) -> str:
        row = times.get((*who, network))
        return "" if row is None else digits(row.median_ms) if row.error is None else "failed"

    def order(who: tuple[str, str]) -> float:
        row = times.get((*who, first))
        return row.median_ms or float("inf") if row else float("inf")

    candidates = sorted(dict.fromkeys(key[:2] for key in times), key=order)
    columns = [f"{name} ({about['macs_per_pixel'] / 1e3:.3g} kMAC a pixel)" for name, about in networks.items()]
    return Table(
        heading=f"Beside other tools on other networks, ms at {rows[0].size}",
        columns=["network in", "run by", *columns],
        rows=[[*who, *(cell(who, network) for network in networks)] for who in candidates],
        note="Networks with weights from a seed are as fast as trained ones.",
    )


def sets_table(record: Record) -> Table | None:
    """Quality on further sets of pairs, a line a set, variant and provider, or None if there are none."""
    if len({row.data for row in record.rows}) < 2:
        return None
    columns, lines = quality_lines(record.rows)
    return Table(heading="Quality by set of pairs", columns=columns, rows=lines, note="Means over the pairs of a set.")


def int8_table(record: Record) -> Table:
    """What each candidate of ``benchmarks/quantization.py`` takes, and loses on every set, fastest first."""
    quality: dict[str, dict[str, dict[str, Any]]] = record.found["quality"]
    sets = list(next(iter(quality.values())))
    lines = []
    for row in sorted(record.rows, key=lambda row: (row.model, row.median_ms or float("inf"))):
        found = [quality[row.model][name].get(f"{row.model}/{row.variant} on {row.provider}") for name in sets]
        lost = [f"{of['drop_db']:.3f} ({of['worst_drop_db']:.2f})" if of and "drop_db" in of else "" for of in found]
        ms = digits(row.median_ms) if row.error is None else "failed"
        lines.append([row.model, row.variant, _run_by(row), ms, *lost])
    size, crop = next(row.size for row in record.rows if row.size), record.settings["crop_px"]
    note = "PSNR lost against fp32, in dB, as the mean of a set and on its worst image, on crops of "
    note += f"{crop}x{crop}; everyone calibrates on the built-in photographs (ours on crops of them), on no set."
    columns = ["network", "quantized", "run by", f"{size}, ms", *sets]
    return Table(heading="int8 beside other tools' int8", columns=columns, rows=lines, note=note)


def pruning_table(record: Record) -> Table:
    """What each share of the multiply-accumulates loses, before and after recovery, and how much faster it is."""
    dense = next(row for row in record.rows if row.variant == "dense")
    small = {row.facts["share"]: row for row in record.rows if row.variant == "recovered"}
    timed = {(row.facts["share"], row.provider): row for row in record.rows if row.median_ms}
    providers = list(dict.fromkeys(provider for _, provider in timed))
    whole = [text for provider in providers for text in ("", digits(timed[1.0, provider].median_ms))]
    titles = {"pruned": "pruned, dB", "recovered": "recovered, dB", "scratch": "from scratch, dB"}
    kinds = [kind for kind in titles if any(f"{kind}_db" in line for line in record.found["summary"])]
    lines = [["100%", f"{dense.facts['macs_per_pixel'] / 1e3:.1f}", *("" for _ in kinds), *whole]]
    for line in record.found["summary"]:
        row = small[line["share"]]
        values = [f"{line['share']:.0%}", f"{row.facts['macs_per_pixel'] / 1e3:.1f}"]
        values += [f"{line[f'{kind}_db']:+.2f}" for kind in kinds]
        for provider in providers:
            ms, times = timed[line["share"], provider].median_ms, line[f"{provider}_speedup"]
            values += [f"{line[f'{provider}_int8_db']:+.2f}", f"{digits(ms)} ({times:.2f}x)"]
        lines.append(values)
    columns = ["MACs kept", "kMAC a pixel", *(titles[kind] for kind in kinds)]
    columns += [text for of in providers for text in (f"int8 on {of}, dB", f"ms at {AT} (times faster)")]
    training, trained = record.settings["training"], [row for row in record.rows if row.variant == "trained on"]
    batch = f"{training['patches']} patches of {training['side_px']} px"
    note = (
        f"PSNR against the dense network's {dense.psnr:.2f} dB (blurred: {dense.psnr_blurred:.2f}), mean of "
        f"{' and '.join(record.settings['sets'])}; int8 against its int8, timed in turn. {training['steps']} steps of "
        f"{batch} each."
    )
    for row in trained:
        note += f" The dense network, trained on for as long: {(row.psnr or 0) - (dense.psnr or 0):+.2f} dB."
    return Table(heading=f"{record.settings['checkpoint']}, pruned", columns=columns, rows=lines, note=note)


def other_tables(record: Record) -> list[Table]:
    """Of a record that brings tables of its own in ``found["tables"]``, these; of a service, its own.

    Else one for each list of dictionaries in ``found``, and one with what else is there, a line a figure.
    """
    title = record.benchmark.capitalize()
    if "tables" in record.found:
        return [msgspec.convert(table, Table) for table in record.found["tables"]]
    if record.benchmark in services.TABLES:
        return [services.TABLES[record.benchmark](record)]
    tables = []
    for name, value in record.found.items():
        if isinstance(value, list) and value and all(isinstance(line, dict) for line in value):
            columns = list(dict.fromkeys(key for line in value for key in line))
            rows = [[dict(_leaves(line.get(column, ""))).get("", "") for column in columns] for line in value]
            heading, titles = f"{title}: {name.replace('_', ' ')}", [column.replace("_", " ") for column in columns]
            tables.append(Table(heading=heading, columns=titles, rows=rows))
    if lines := [[name, value] for name, value in _leaves(record.found)]:
        tables.append(Table(heading=title, columns=["figure", "value"], rows=lines))
    return tables


def other_figures(record: Record, folder: Path) -> list[Figure]:
    """Such a record's ``found["points"]`` as quality against latency, and the figures NAME_*.svg beside it."""
    title = record.benchmark.capitalize()
    figures = []
    if points := [msgspec.convert(point, Point) for point in record.found.get("points", [])]:
        svg = plots.pareto(points, record.found.get("psnr_blurred"), record.settings.get("size", AT), record.benchmark)
        figures.append(Figure(heading=f"{title}: quality against latency", svg=svg))
    for path in sorted(folder.glob(f"{record.benchmark}_*.svg")):
        # A file has a style for its own background; here the page's holds.
        svg = re.sub(r"<style>svg\{.*?</style>", "", path.read_text(encoding="utf-8"), count=1, flags=re.DOTALL)
        what = path.stem.removeprefix(f"{record.benchmark}_").replace("_", " ")
        figures.append(Figure(heading=f"{title}: {what}", svg=svg))
    return figures


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Numbers and texts of nested dictionaries, by their path; lists are left to the record."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}, {key}" if name else str(key))
    elif isinstance(value, float):
        yield name.replace("_", " "), f"{value:.4g}"
    elif isinstance(value, int | str):
        yield name.replace("_", " "), str(value)


def ran(row: Row) -> str:
    """Shorter than ``row.ran``: the threads are the same in the whole table."""
    receipt = row.facts.get("receipt")
    return f"{receipt['provider']}, {receipt['effective_precision']}" if receipt else row.provider


def _run_by(row: Row) -> str:
    return f"deblur_deploy, {row.provider}" if "receipt" in row.facts else row.provider


def shares_table(record: Record) -> Table:
    """Operations, bytes, and the share of the ceilings."""
    lines = [
        [
            row["variant"] if row.get("size", AT) == AT else f"{row['variant']}, {row['size']}",
            f"{row['provider']} in {row['arithmetic']}",
            digits(row["ms"]),
            digits(row["giga_operations"]),
            digits(row["mega_bytes"]),
            f"{row['tops']:.3f}",
            f"{row['share_of_compute']:.0%}",
            f"{row['share_of_bandwidth']:.0%}",
        ]
        for row in record.found["shares"]
    ]
    ceilings = [
        f"{device} {name.removesuffix('_tops').removesuffix('_gb_per_s')} {of['rate']:.3g} "
        f"{'GB/s' if name.startswith('copy') else 'Tera-operations/s'} ({of['library']})"
        for device, found in record.found["ceilings"].items()
        for name, of in found.items()
    ]
    columns = ["variant", "ran on", "ms", "Giga-operations", "MB moved", "Tera-operations/s", "of compute"]
    note = "Bytes as if no cache kept anything. Ceilings: " + "; ".join(ceilings) + "."
    return Table(
        heading=f"Against the machine's ceilings, {record.settings['size']}",
        columns=[*columns, "of bandwidth"],
        rows=lines,
        note=note,
    )


def scaling_tables(record: Record) -> list[Table]:
    """Cost against pixels, threads, streams and batch."""
    found = record.found
    ran = f"{record.settings['variant']} on {record.settings['provider']}"
    pixels = [
        [row["size"], digits(row["ms"]), digits(row["ms_per_megapixel"]), number(row["peak_mb"], ".0f")]
        for row in found["pixels"]
    ]
    more = [["threads", str(row["threads"]), digits(row["ms"])] for row in found["threads"]]
    more += [
        ["streams", str(row["streams"]), digits(1e3 / row["images_per_s"] if row["images_per_s"] else None)]
        for row in found["streams"]
    ]
    more += [["batch", str(row["batch"]), digits(row["ms_per_image"])] for row in found["batch"] if "batch" in row]
    columns = ["size", "ms", "ms a megapixel", "peak MB"]
    return [
        Table(heading=f"Cost of pixels, {ran}", columns=columns, rows=pixels),
        Table(
            heading=f"Threads, streams and batch, {ran}",
            columns=["what", "how many", "ms an image"],
            rows=more,
            note=f"At {AT}; streams share the threads among them.",
        ),
    ]


def _share(share: dict[str, Any] | None) -> str:
    return "" if share is None else f"{max(share['share_of_compute'], share['share_of_bandwidth']):.0%}"
