"""The two pages of a bundle for people: ``report.html``, self-contained, and the model card ``README.md``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from deblur_deploy.evaluation import plots
from deblur_deploy.evaluation.page import Figure, Page, Table, pictures_of, write_page
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.pipeline import prune_report
from deblur_deploy.pipeline.artifact import Artifact, Measured
from deblur_deploy.runtime.engine import DeblurEngine

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("deblur_deploy.pipeline", "templates"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # noqa: S701 (Markdown)
)


def write_report(
    path: Path, summary: dict[str, Any], results: Sequence[Measured], pairs: Sequence[Pair], shown: Artifact
) -> None:
    """Pictures before and after (by the variant ``shown``, on the CPU), quality against latency, all variants."""
    points = [
        plots.Point(
            label=f"{result.artifact.name}, {run.provider}",
            group=run.provider,
            milliseconds=run.median_ms,
            psnr=result.quality.psnr,
        )
        for result in results
        for run in result.runs
    ]
    psnr_blurred = results[0].quality.psnr_blurred
    pareto = [Figure(heading="Quality against latency", svg=plots.pareto(points, psnr_blurred, summary["timed_at"]))]
    figures, tables = pareto if points else [], [_table(summary, results)]
    if pruning := summary.get("pruning"):
        figures += [Figure(heading="Sensitivity of each layer", svg=prune_report.sensitivity_figure(pruning))]
        tables += [prune_report.outcome(pruning), prune_report.widths(pruning)]
    about = summary["machine"]
    with DeblurEngine(shown.path, provider="cpu") as engine:
        pictures = pictures_of(pairs, engine)
    page = Page(
        title=summary["name"],
        lead=f"{summary['macs_per_pixel'] / 1000:.1f} kMAC per pixel, {summary['parameters']:,} parameters. "
        f"Checkpoint {summary['checkpoint']}, sha256 {summary['checkpoint_sha256'][:16]}…",
        pictures=pictures,
        shown=shown.name,
        figures=figures,
        tables=tables,
        notes=[
            f"{about['processor']}, {about['cores']} cores ({', '.join(about['instructions'])}). "
            + ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
        ],
    )
    write_page(path, page)


def _table(summary: dict[str, Any], results: Sequence[Measured]) -> Table:
    columns = ["variant", "MB", "PSNR, dB", "gain, dB", "SSIM", "lost to fp32, dB", "worst image, dB"]
    columns += [f"{run.provider}, ms" for run in results[0].runs]
    rows = [
        [
            result.artifact.name,
            f"{result.size_bytes / 1e6:.1f}",
            f"{result.quality.psnr:.2f}",
            f"{result.quality.gain_db:+.2f}",
            f"{result.quality.ssim:.4f}",
            f"{result.drop_db:.3f}",
            f"{result.worst_drop_db:.3f}",
            *(f"{run.median_ms:.1f} ({run.arithmetic})" for run in result.runs),
        ]
        for result in results
    ]
    note = f"PSNR and SSIM: mean of {len(summary['pairs'])} pairs. Latency: median at {summary['timed_at']}, uint8 "
    return Table(heading="Variants", columns=columns, rows=rows, note=note + "to uint8.")


def write_card(path: Path, summary: dict[str, Any], results: Sequence[Measured]) -> None:
    """What the model is, what was measured of it, how it is embedded."""
    text = _TEMPLATES.get_template("card.md.j2").render(summary=summary, results=results)
    path.write_text(text, encoding="utf-8")
