"""Shows a ``record`` to people, and measures nothing: table rows, figures, and the lines below them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from deblur_deploy.evaluation import plots
from deblur_deploy.evaluation.page import Figure, Table
from deblur_deploy.evaluation.record import Record, Row

COSTS = (
    "model", "variant", "provider", "size", "p50\nms", "p95\nms", "±", "calls", "Mpx/s", "fps", "peak\nMB", "GPU\nMB",
    "load\nms", "first\nms",
)  # fmt: skip
QUALITIES = ("model", "variant", "provider", "on", "PSNR dB", "gain dB", "SSIM", "to fp32 dB", "really ran")


def costs(row: Row) -> list[str]:
    """Latency and memory of a row as text, in the order of ``COSTS``."""
    return [
        row.model,
        row.variant,
        row.provider,
        row.size,
        "failed" if row.error else digits(row.median_ms),
        digits(row.p95_ms),
        number(row.noise, ".0%"),
        str(row.calls or ""),
        digits(row.megapixels_per_s),
        digits(row.frames_per_s),
        number(row.peak_mb, ".0f"),
        number(row.gpu_mb, ".0f"),
        number(row.load_ms, ".0f"),
        digits(row.first_ms),
    ]


def qualities(row: Row) -> list[str]:
    """Quality of a row as text, in the order of ``QUALITIES``; the same for every size."""
    return [
        row.model,
        row.variant,
        row.provider,
        row.data,
        number(row.psnr, ".3f"),
        number(None if row.psnr is None or row.psnr_blurred is None else row.psnr - row.psnr_blurred, "+.2f"),
        number(row.ssim, ".4f"),
        number(row.psnr_to_fp32, ".1f"),
        row.ran or "nothing",
    ]


def one_a_variant(rows: Sequence[Row]) -> list[Row]:
    """The first row of each model, variant, provider and set of pairs that has one without error, else its first."""

    def key(row: Row) -> tuple[str, ...]:
        return row.data, *row.key[:3]

    found: dict[tuple[str, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row.error is not None):
        found.setdefault(key(row), row)
    return [found[one] for one in dict.fromkeys(map(key, rows))]


def cost_lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """``COSTS`` and a line a row of those that have a size, without columns that tell nothing."""
    return _telling(rows, without_empty(COSTS, [costs(row) for row in rows if row.size]))


def quality_lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """``QUALITIES`` and a line for each of ``one_a_variant``, without columns that tell nothing."""
    return _telling(rows, without_empty(QUALITIES, [qualities(row) for row in one_a_variant(rows)]))


def _telling(rows: Sequence[Row], grid: tuple[list[str], list[list[str]]]) -> tuple[list[str], list[list[str]]]:
    """Without the model and the set of pairs, where all rows have the same."""
    same = {"model": len({row.model for row in rows}) <= 1, "on": len({row.data for row in rows}) <= 1}
    kept = [at for at, name in enumerate(grid[0]) if not same.get(name)]
    return [grid[0][at] for at in kept], [[line[at] for at in kept] for line in grid[1]]


def labels(rows: Sequence[Row]) -> dict[tuple[str, str, str], str]:
    """What a figure calls each model, variant and provider; the model only where there are several."""
    several = len({row.model for row in rows}) > 1
    return {row.key[:3]: f"{f'{row.model} ' * several}{row.variant}, {row.provider}" for row in rows}


def without_empty(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns that hold a text in some line, and the lines of only these."""
    kept = [at for at, _ in enumerate(columns) if not lines or any(line[at] for line in lines)]
    return [columns[at] for at in kept], [[line[at] for at in kept] for line in lines]


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
    sets = {row.data: row.psnr_blurred for row in record.rows if row.psnr_blurred is not None}
    counts = record.settings.get("sets", {})
    lines += [
        f"PSNR of the blurred images: {value:.2f} dB, mean of {counts.get(name, 'the')} pairs ({name})"
        for name, value in sets.items()
    ]
    if record.machine_noise is not None:
        restless = ": this was no idle machine, measure again" if record.machine_noise > 0.05 else ""
        lines.append(f"machine noise: a fixed computation varied by {record.machine_noise:.1%}{restless}")
    lines += [line for line in (waiting(record),) if line]
    lines += [f"note: {note}" for note in record.notes]
    failed: dict[tuple[str, str], list[str]] = {}
    for row in record.rows:
        if row.error:
            failed.setdefault((f"{row.model}/{row.variant} on {row.provider}", row.error), []).append(row.size)
    return lines + [
        f"FAILED {', '.join([name, *filter(None, sizes)])}: {error}" for (name, error), sizes in failed.items()
    ]


def waiting(record: Record) -> str:
    """How much the machine was busy with other things, or nothing where that is unknown."""
    shares = [row.waited for row in record.rows if row.waited is not None]
    if not shares:
        return ""
    line = f"waiting for a core that another process had: {fmean(shares):.1%} of the timed calls"
    if record.stolen is not None:
        line += f"; taken by the host: {record.stolen:.1%} of the processor"
    if fmean(shares) > 0.02:
        apart = [row.steady_ms / row.median_ms for row in record.rows if row.steady_ms and row.median_ms]
        line += f"; without the waiting the medians are {1 - fmean(apart):.0%} lower (steady_ms in the record)"
    return line


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
        called = labels(rows)
        series: dict[str, dict[float, float]] = {}
        for row in rows:
            assert row.median_ms is not None
            series.setdefault(called[row.key[:3]], {})[row.pixels / 1e6] = row.median_ms
        found.append(Figure(heading="Latency by size", svg=plots.latency_by_size(series)))
    return found


def pareto_points(rows: Sequence[Row], group: str | None = None) -> list[plots.Point]:
    """Rows that have both latency and quality, grouped by provider unless ``group`` is given."""
    called = labels(rows)
    return [
        plots.Point(
            label=called[row.key[:3]] if group is None else row.variant,
            group=group or row.provider,
            milliseconds=row.median_ms,
            psnr=row.psnr,
        )
        for row in rows
        if row.median_ms is not None and row.psnr is not None
    ]


def tables(record: Record) -> list[Table]:
    """The rows of a record, quality apart from cost."""
    note = (
        "Median and 95th percentile, uint8 array to uint8 array; ± is half the median's 95 % confidence interval, of "
    )
    note += (
        "less than six calls half their range; peak memory is that of a process that does nothing else; load is from "
    )
    note += "import to ready."
    columns, lines = cost_lines(record.rows)
    latency = Table(heading="Latency and memory", columns=columns, rows=lines, note=note)
    columns, lines = quality_lines(record.rows)
    note = "PSNR and SSIM against ground truth, mean over the pairs; PSNR against the results of fp32."
    return [latency, Table(heading="Quality", columns=columns, rows=lines, note=note)]
