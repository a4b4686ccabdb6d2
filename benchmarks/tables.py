"""The tables of the report, as text made from records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deblur_deploy.evaluation.page import Table
from deblur_deploy.evaluation.record import Record, Row
from deblur_deploy.evaluation.views import blurred, digits, number, one_a_variant

AT = "1280x720"


def product_table(rows: Sequence[Row], limits: Record | None) -> Table:
    """One line a variant and provider: latency at every size, memory, quality and the share of the ceiling."""
    sizes = list(dict.fromkeys(row.size for row in rows))
    by_key = {row.key: row for row in rows}
    shares = {(row["variant"], row["provider"]): row for row in limits.found["shares"]} if limits else {}
    lines = []
    for row in one_a_variant(rows):
        timed = [by_key.get((*row.key[:3], size)) for size in sizes]
        at = by_key.get((*row.key[:3], AT), row)
        share = shares.get((row.variant, row.provider))
        lines.append(
            [
                row.variant,
                row.ran if row.error is None else f"{row.provider}: failed",
                *("failed" if each is None or each.error else digits(each.median_ms) for each in timed),
                digits(at.frames_per_s),
                number(at.peak_mb, ".0f"),
                number(row.psnr, ".2f"),
                number(None if row.psnr is None or row.psnr_blurred is None else row.psnr - row.psnr_blurred, "+.2f"),
                number(row.ssim, ".4f"),
                number(row.psnr_to_fp32, ".1f"),
                *([_share(share)] if limits else []),
            ]
        )
    columns = ["variant", "ran on", *(f"{size}, ms" for size in sizes), f"fps at {AT}", "peak MB", "PSNR, dB"]
    columns += ["gain, dB", "SSIM", "to fp32, dB", *(["of the ceiling"] if limits else [])]
    psnr_blurred = blurred(rows)
    note = "Median latency from a uint8 array to a uint8 array; peak memory of a process that does nothing else; "
    note += f"PSNR and SSIM on the built-in pairs, whose blurred images have {number(psnr_blurred, '.2f')} dB."
    return Table(heading="The shipped variants", columns=columns, rows=lines, note=note)


def peers_table(record: Record) -> Table:
    """Everything that took turns in the peers' run, fastest first."""
    rows = sorted(record.rows, key=lambda row: row.median_ms or float("inf"))
    fastest = rows[0].median_ms
    lines = [
        [
            row.variant,
            row.provider if "receipt" not in row.facts else f"deblur_deploy, {row.provider}",
            digits(row.median_ms) if row.error is None else "failed",
            number(row.noise, ".1%"),
            number(row.median_ms / fastest if row.median_ms and fastest else None, ".2f"),
            number(row.peak_mb, ".0f"),
            digits(row.load_ms),
            digits(row.first_ms),
            number(row.psnr, ".2f"),
            number(row.psnr_to_fp32, ".1f"),
        ]
        for row in rows
    ]
    size = rows[0].size
    columns = ["network in", "run by", f"{size}, ms", "±", "times the fastest", "peak MB", "load, ms", "first, ms"]
    columns += ["PSNR, dB", "to fp32, dB"]
    note = f"The same weights, threads and run; PSNR on {record.settings['data']}; settings of each are in peers.json."
    return Table(heading="Beside other tools", columns=columns, rows=lines, note=note)


def times_faster(record: Record) -> str:
    """The claim about int8 on ONNX Runtime's own kernels, or nothing if it was not measured."""
    ratio: dict[str, Any] = record.found.get("int8_cpu_against_eager_fp32") or {}
    if "ratio" not in ratio:
        return ""
    return (
        f"int8 on ONNX Runtime's own CPU kernels takes {digits(ratio['int8_ms'])} ms at {ratio['size']}, eager PyTorch "
        f"in fp32 {digits(ratio['eager_fp32_ms'])} ms with the same weights and threads, in turn: "
        f"**{ratio['ratio']:.1f} times** faster."
    )


def shares_table(record: Record) -> Table:
    """Operations, bytes, and the share of the ceilings."""
    lines = [
        [
            row["variant"],
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
