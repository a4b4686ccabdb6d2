"""What a person sees of pruning: what it cost and brought, the widths, how sensitive each layer is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deblur_deploy.evaluation.page import Table


def outcome(pruning: Mapping[str, Any]) -> Table:
    """Cost, latency and quality before and after; ``pruning`` is that of ``bundle.json``."""
    macs, parameters, latency, psnr = (pruning[name] for name in ("macs_per_pixel", "parameters", "latency", "psnr"))
    rows = [
        ["kMAC per pixel", *(f"{value / 1000:.2f}" for value in macs), f"{macs[1] / macs[0]:.1%}"],
        ["parameters", *(f"{value:,}" for value in parameters), f"{parameters[1] / parameters[0]:.1%}"],
    ]
    if latency:
        where = f"{latency['precision']} at {latency['at']} on {latency['provider']}, ms"
        before, after = latency["dense_ms"], latency["ms"]
        rows.append([where, f"{before:.1f}", f"{after:.1f}", f"{before / after:.2f}x"])
    rows += [
        [f"PSNR {when} recovery, dB", *_psnr(psnr, name)]
        for when, name in (("before", "pruned"), ("after", "recovered"))
        if name in psnr
    ]
    return Table(
        heading="Pruning", columns=["", "before", "after", ""], rows=rows, note=" ".join(sentences(pruning["notes"]))
    )


def widths(pruning: Mapping[str, Any]) -> Table:
    """Channels of each layer, before and after."""
    rows = [[name, str(before), str(after)] for name, (before, after) in pruning["widths"].items()]
    return Table(heading="Widths", columns=["layer", "before", "after"], rows=rows)


def sensitivity_figure(pruning: Mapping[str, Any]) -> str:
    """SVG: PSNR when one layer alone loses some of its channels."""
    from deblur_deploy.evaluation import plots

    series = {
        name: {100 * float(gone): psnr for gone, psnr in curve.items()}
        for name, curve in pruning["sensitivity"].items()
    }
    return plots.curves(series, "channels removed from one layer, %", "PSNR, dB")


def _psnr(psnr: Mapping[str, float], name: str) -> list[str]:
    return [f"{psnr['dense']:.3f}", f"{psnr[name]:.3f}", f"{psnr[name] - psnr['dense']:+.3f}"]


def sentences(notes: list[str]) -> list[str]:
    """Notes as sentences."""
    return [f"{note[0].upper()}{note[1:]}." for note in notes]
