"""What people see of a record: table rows, figures, and the lines below them."""

from __future__ import annotations

from collections.abc import Sequence

from deblur_deploy.evaluation import plots
from deblur_deploy.evaluation.page import Figure, Table
from deblur_deploy.evaluation.record import Record, Row

COSTS = (
    "variant", "provider", "size", "p50\nms", "p95\nms", "±", "Mpx/s", "fps", "peak\nMB", "load\nms", "first\nms",
)  # fmt: skip
QUALITIES = ("variant", "provider", "PSNR dB", "SSIM", "to fp32 dB", "really ran")


def costs(row: Row) -> list[str]:
    """Latency and memory of a row as text, in the order of ``COSTS``."""
    return [
        row.variant,
        row.provider,
        row.size,
        "failed" if row.error else digits(row.median_ms),
        digits(row.p95_ms),
        number(row.noise, ".0%"),
        digits(row.megapixels_per_s),
        digits(row.frames_per_s),
        number(row.peak_mb, ".0f"),
        number(row.load_ms, ".0f"),
        digits(row.first_ms),
    ]


def qualities(row: Row) -> list[str]:
    """Quality of a row as text, in the order of ``QUALITIES``; the same for every size."""
    return [
        row.variant,
        row.provider,
        number(row.psnr, ".3f"),
        number(row.ssim, ".4f"),
        number(row.psnr_to_fp32, ".1f"),
        row.ran if row.error is None else "nothing",
    ]


def one_a_variant(rows: Sequence[Row]) -> list[Row]:
    """The first row of each model, variant and provider that has one without error, else its first."""
    found: dict[tuple[str, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row.error is not None):
        found.setdefault(row.key[:3], row)
    order = list(dict.fromkeys(row.key[:3] for row in rows))
    return [found[key] for key in order]


def digits(value: float | None) -> str:
    """``value`` with three significant digits or all of its integer part, or nothing."""
    return number(value, ".0f" if value is None or value >= 99.95 else ".1f" if value >= 9.995 else ".2f")


def number(value: float | None, form: str) -> str:
    """``value`` formatted, or nothing."""
    return "" if value is None else format(value, form)


def summary(record: Record) -> list[str]:
    """What belongs below the table."""
    about = record.machine
    threads = record.settings.get("threads", about.get("cores"))
    lines = [f"{about.get('processor')}, {about.get('cores')} cores, {threads} threads"]
    lines += [f"GPU: {gpu}" for gpu in about.get("gpus", [])]
    psnr_blurred = blurred(record.rows)
    if psnr_blurred is not None:
        pairs = len(record.settings.get("pairs", []))
        lines.append(f"PSNR of the blurred images: {psnr_blurred:.2f} dB, mean of {pairs} ({record.settings['data']})")
    if record.machine_noise is not None:
        restless = ": this was no idle machine, measure again" if record.machine_noise > 0.05 else ""
        lines.append(f"machine noise: a fixed computation varied by {record.machine_noise:.1%}{restless}")
    lines += [f"note: {note}" for note in record.notes]
    failed: dict[str, list[str]] = {}
    for row in record.rows:
        if row.error:
            failed.setdefault(f"FAILED {row.model}/{row.variant} on {row.provider}, {{}}: {row.error}", []).append(
                row.size
            )
    return lines + [line.replace("{}", ", ".join(sizes), 1) for line, sizes in failed.items()]


def blurred(rows: Sequence[Row]) -> float | None:
    """PSNR of the images as they were given, the same for all rows."""
    return next((row.psnr_blurred for row in rows if row.psnr_blurred is not None), None)


def figures(record: Record) -> list[Figure]:
    """Quality against cost, and cost against size, as far as the rows go."""
    rows = [row for row in record.rows if row.error is None and row.median_ms is not None]
    found = []
    sizes = list(dict.fromkeys(row.size for row in rows))
    size = "1280x720" if "1280x720" in sizes else next(iter(sizes), "")
    points = pareto_points([row for row in rows if row.size == size])
    if points:
        found.append(Figure(heading="Quality against latency", svg=plots.pareto(points, blurred(rows), size)))
    if len(sizes) > 1:
        series: dict[str, dict[float, float]] = {}
        for row in rows:
            assert row.median_ms is not None
            series.setdefault(f"{row.variant}, {row.provider}", {})[row.pixels / 1e6] = row.median_ms
        found.append(Figure(heading="Latency by size", svg=plots.latency_by_size(series)))
    return found


def pareto_points(rows: Sequence[Row], group: str | None = None) -> list[plots.Point]:
    """Rows that have both latency and quality, grouped by provider unless ``group`` is given."""
    return [
        plots.Point(
            label=f"{row.variant}, {row.provider}" if group is None else row.variant,
            group=group or row.provider,
            milliseconds=row.median_ms,
            psnr=row.psnr,
        )
        for row in rows
        if row.median_ms is not None and row.psnr is not None
    ]


def tables(record: Record) -> list[Table]:
    """The rows of a record, quality apart from cost."""
    note = "Median and 95th percentile, uint8 array to uint8 array; ± is half the median's 95 % confidence interval; "
    note += "peak memory is that of a process that does nothing else; load is from import to ready."
    return [
        Table(heading="Latency and memory", columns=COSTS, rows=[costs(row) for row in record.rows], note=note),
        Table(
            heading="Quality",
            columns=QUALITIES,
            rows=[qualities(row) for row in one_a_variant(record.rows)],
            note="PSNR and SSIM against ground truth, mean over the pairs; PSNR against the results of fp32.",
        ),
    ]
