"""The two pages of a bundle for people: ``report.html``, self-contained, and the model card ``README.md``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from deblur_deploy.evaluation import plots
from deblur_deploy.evaluation.page import Figure, Page, Table, pictures_of, write_page
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.files import sha256
from deblur_deploy.pipeline.artifact import Artifact, Measured
from deblur_deploy.pipeline.pruning import report as prune_report
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.shipped import DEFAULT_CHECKPOINT

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
    figures, tables = pareto if points else [], [_table(summary, results), *_int8_tables(summary)]
    if pruning := summary.get("pruning"):
        if pruning.get("sensitivity"):
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
            *prune_report.sentences(summary["notes"]),
            f"{about['processor']}, {about['cores']} cores ({', '.join(about['instructions'])}). "
            + ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
        ],
    )
    write_page(path, page)


def _table(summary: dict[str, Any], results: Sequence[Measured]) -> Table:
    columns = ["variant", "MB", "PSNR, dB", "gain, dB", "SSIM", "lost to fp32, dB", "worst image, dB"]
    for run in results[0].runs:
        columns += [f"{run.provider}, ms", "MACs in int8"]
    rows = [
        [
            result.artifact.name,
            f"{result.size_bytes / 1e6:.1f}",
            f"{result.quality.psnr:.2f}",
            f"{result.quality.gain_db:+.2f}",
            f"{result.quality.ssim:.4f}",
            f"{result.drop_db:.3f}",
            f"{result.worst_drop_db:.3f}",
            *(text for of in results[0].runs for text in _run(result, of.provider)),
        ]
        for result in results
    ]
    note = f"PSNR and SSIM: mean of {len(summary['pairs'])} pairs. Latency: median at {summary['timed_at']}, uint8 "
    note += "to uint8. MACs in int8: share of the multiplications, read from the graph that the provider made."
    return Table(heading="Variants", columns=columns, rows=rows, note=note)


def _run(result: Measured, provider: str) -> tuple[str, str]:
    """Latency and share in int8; empty where the variant's layout does not suit ``provider``."""
    if (run := result.on(provider)) is None:
        return "", ""
    slower = ", slower than fp32" if provider in result.slower_than_fp32_on else ""
    share = "not told" if run.int8_macs is None else f"{run.int8_macs:.1%}"
    return f"{run.median_ms:.1f} ({run.arithmetic}){slower}", share


def _int8_tables(summary: dict[str, Any]) -> list[Table]:
    """What was left out and why; what was tried for int8, what each layer loses, and what it was calibrated on."""
    int8, left = summary["int8"], [[name, why] for name, why in summary["left_out"].items()]
    before = [Table(heading="Left out", columns=["", "why"], rows=left)] if left else []
    return before + (_tried(int8) if "trials" in int8 else [])


def _tried(int8: dict[str, Any]) -> list[Table]:
    trials = [
        [
            trial["method"] + (", layers only" if trial["breadth"] == "layers" else ""),
            str(len(trial["in_float"])),
            f"{trial['macs']:.1%}",
            f"{trial['drop_db']:.4f}",
            f"{trial['worst_drop_db']:.4f} ({trial['worst_image']})",
            "" if trial["median_ms"] is None else f"{trial['median_ms']:.1f}",
            "chosen" if trial == int8["chosen"] else "",
        ]
        for trial in int8["trials"]
    ]
    columns = [
        "calibration",
        "layers in float",
        "MACs in int8",
        "lost to fp32, dB",
        "worst image, dB",
        "ms at 640x360",
        "",
    ]
    float_ops = sorted({name for names in int8["float_ops"].values() for name in names})
    note = f"No int8 kernel here, so left in float: {', '.join(float_ops)}." if float_ops else ""
    tables = [Table(heading="int8: what was tried", columns=columns, rows=trials, note=note)]
    if int8["sensitivity"]:
        rows = [
            [
                row["layer"],
                f"{row['macs']:.1%}",
                f"{row['drop_db']:.4f}",
                f"{row['error']:.4f}",
                "" if row["ms_saved"] is None else f"{row['ms_saved']:.2f}",
            ]
            for row in int8["sensitivity"]
        ]
        columns = ["only this layer in int8", "MACs", "lost, dB", "squared error, levels²", "ms saved, cpu"]
        note = "On a few crops, so a loss below zero is rounding that happened to help; the error is what adds up."
        tables.append(Table(heading="int8: each layer", columns=columns, rows=rows, note=note))
    audit = int8["audit"]
    kinds = [[kind, f"{share:.0%}", f"{audit['held_out_kinds'][kind]:.0%}"] for kind, share in audit["kinds"].items()]
    worst = sorted(audit["clipped"].items(), key=lambda item: -item[1])[:3]
    note = f"{audit['tiles']} tiles of {audit['tile_px']} px from {len(audit['photos'])} photographs: "
    note += f"{', '.join(audit['photos'])}. Of the pairs' values outside of the calibrated ranges: "
    note += ", ".join(f"{share:.4%} of {name}" for name, share in worst) + " at most."
    for words, names in (
        ("Too small for a tile", audit["left_out"]),
        ("Also among the pairs", audit["shared_with_pairs"]),
        ("Among the pairs, but not calibrated on, are tiles that are", audit["missing"]),
    ):
        note += f" {words}: {', '.join(names)}." if names else ""
    columns = ["share of tiles that are", "calibration", "pairs"]
    return [*tables, Table(heading="int8: calibration", columns=columns, rows=kinds, note=note)]


def write_card(path: Path, summary: dict[str, Any], results: Sequence[Measured]) -> None:
    """What the model is, what was measured of it, how it is embedded."""
    text = _TEMPLATES.get_template("card.md.j2").render(summary=summary, results=results)
    front = front_matter(summary["checkpoint_sha256"], [result.artifact.name for result in results])
    path.write_text(front + text, encoding="utf-8", errors="backslashreplace")


def front_matter(checkpoint_sha256: str, variants: Sequence[str]) -> str:
    """The head by which model hubs file a card; of weights that are not ours we know no licence."""
    ours = DEFAULT_CHECKPOINT.is_file() and sha256(DEFAULT_CHECKPOINT) == checkpoint_sha256
    precisions = [name for name in ("fp16", "int8") if name in variants]
    tags = "\n".join(f"- {tag}" for tag in ("deblurring", "image-restoration", "onnx", "onnxruntime", *precisions))
    return f"""---
license: {"mit" if ours else "unknown"}
library_name: onnx
pipeline_tag: image-to-image
tags:
{tags}
metrics:
- psnr
- ssim
---
"""
