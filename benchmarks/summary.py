"""The few figures that README and the index of the benchmarks show, each from a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tables import AT, at_one_size, ran

from deblur_deploy.evaluation.page import Table
from deblur_deploy.evaluation.record import Record, Row
from deblur_deploy.evaluation.views import digits, number

_WHAT_FOR = {
    "fp32": "the reference",
    "fp16": "GPUs",
    "float": "images of more than 8 bits",
    "int8": "CPUs; what runs by default",
    "int8-planes": "the same for OpenVINO and GPUs",
}


def short_table(rows: Sequence[Row], sizes: Mapping[str, int]) -> Table:
    """One line a variant, on the provider that is fastest: what for, size of the file, latency and quality."""
    lines = []
    at = [row for row in rows if row.size == AT and row.error is None and row.median_ms is not None]
    for variant in dict.fromkeys(row.variant for row in rows):
        row = min((row for row in at if row.variant == variant), key=lambda row: row.median_ms or 0, default=None)
        size = number(sizes[variant] / 1e6 if variant in sizes else None, ".1f")
        what = [variant, _WHAT_FOR.get(variant, ""), size]
        if row is None:
            lines.append([*what, "failed", "", ""])
        else:
            quality = f"{number(row.psnr_blurred, '.2f')} → {number(row.psnr, '.2f')}" if row.psnr is not None else ""
            lines.append([*what, ran(row), digits(row.median_ms), quality])
    columns = ["file", "for", "MB", "ran on", f"{AT}, ms", "PSNR, dB"]
    return Table(heading="What is in the bundle", columns=columns, rows=lines)


def machines_table(machines: Mapping[str, Mapping[str, Record]], described: Mapping[str, str]) -> Table:
    """One line a machine: our fastest, the fastest of other tools, and eager PyTorch, on the product's own network."""
    lines = []
    for name, records in machines.items():
        rows = [row for row in records["latency"].rows if row.size == AT]
        if "peers" in records:
            model = records["peers"].found["product_model"]
            rows = [row for row in at_one_size(records["peers"]) if row.model == model]
        timed = sorted((row for row in rows if row.error is None and row.median_ms), key=lambda row: row.median_ms or 0)
        ours = [row for row in timed if "receipt" in row.facts]
        others = [row for row in timed if "receipt" not in row.facts]
        eager = [row for row in others if (row.variant, row.provider) == ("eager fp32", "PyTorch")]
        shown = [
            f"{digits(row[0].median_ms)} ({row[0].variant}, {row[0].provider})" if row else "" for row in (ours, others)
        ]
        date = records["latency"].date[:10]
        lines.append([f"[{described[name]}]({name}.md)", *shown, digits(eager[0].median_ms) if eager else "", date])
    columns = ["machine", "our fastest", "fastest of other tools", "PyTorch, eager fp32", "measured"]
    note = f"ms at {AT}, uint8 array to uint8 array, the same weights and threads."
    return Table(heading="Machines", columns=columns, rows=lines, note=note)


def times_faster(record: Record, link: str = "") -> str:
    """The claim about int8 on ONNX Runtime's own kernels, or nothing if it was not measured."""
    ratio: dict[str, Any] = record.found.get("int8_cpu_against_eager_fp32") or {}
    if "ratio" not in ratio:
        return ""
    return (
        f"In turn, in a run of their own, int8 on ONNX Runtime's CPU kernels took {digits(ratio['int8_ms'])} ms at "
        f"{ratio['size']} and eager PyTorch in fp32 {digits(ratio['eager_fp32_ms'])} ms, with the same weights and "
        f"threads: **{ratio['ratio']:.1f} times** faster"
        + (f" ([other tools, other machines]({link}))." if link else ".")
    )


def quality_sentence(record: Record, link: str, larger: Record | None) -> str:
    """What the variant that runs by default gains on each set of pairs, or nothing if it was not measured.

    ``larger``: the same of the preset ``quality``, which is for those who have the time.
    """
    if not (gains := _gains(record)):
        return ""
    links = f"[the sets](models/README.md), [every variant]({link})"
    said = f"int8 gains in PSNR over the blurred photographs: {gains}; {links}."
    if larger is not None and (more := _gains(larger)):
        said += f" The larger `quality` ([weights](models/README.md)) gains, in int8: {more}."
    return said


def _gains(record: Record) -> str:
    return ", ".join(
        f"{row.psnr - row.psnr_blurred:+.2f} dB ({row.data})"
        for row in record.rows
        if (row.variant, row.provider) == ("int8", "cpu") and row.psnr is not None and row.psnr_blurred is not None
    )


def int8_sentence(record: Record, link: str) -> str:
    """The most that int8 loses against fp32, as the mean of a set and on one image; nothing if it was not measured."""
    fp32 = {row.data: row.psnr for row in record.rows if (row.variant, row.provider) == ("fp32", "cpu")}
    int8 = [row for row in record.rows if (row.variant, row.provider) == ("int8", "cpu") and row.data in fp32]
    if not int8:
        return ""
    means = [(fp32[row.data] or 0) - (row.psnr or 0) for row in int8]
    images = [row.worst_drop_db for row in int8 if row.worst_drop_db is not None]
    worst = f", and {max(images):.3f} dB on any image" if images else ""
    most = f"{max(max(means), 0):.3f} dB in the mean of any of these sets"
    return f"int8 loses at most {most}{worst}; [how its budget is kept]({link})."
