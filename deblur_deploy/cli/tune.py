"""deblur-bench --tune: finds out what is fastest here, and keeps it for every engine to come."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deblur_deploy.bundles.names import located
from deblur_deploy.cli.common import OK
from deblur_deploy.evaluation.tune import Outcome, describe, tune
from deblur_deploy.runtime.tuned import save
from deblur_deploy.shipped import DEFAULT_BUNDLE


def run(models: Sequence[Path], *, providers: Sequence[str], budget_s: float, console: Console) -> int:
    """Tune each of ``models``, by default the shipped one; returns the exit status."""
    for model in map(located, models or (DEFAULT_BUNDLE,)):
        with console.status("starting") as status:
            outcome = tune(
                model,
                providers=providers,
                budget_s=budget_s,
                on_progress=lambda what: status.update(escape(what)),
            )
        path = save(model, outcome.best)
        out = Console(width=None if sys.stdout.isatty() else 120)
        out.print(table(outcome))
        best = f"{describe(outcome.best)}, on {outcome.best.provider}"
        out.print(
            f"{model.name}: {best}; {outcome.faster:.2f} times as fast as the engine's own choice\n"
            f"kept in {path}: DeblurEngine({repr(str(model)) if models else ''}) uses it unless told otherwise",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return OK


def table(outcome: Outcome) -> Table:
    """One line a candidate, in the order of the questions; ``*`` marks what went on."""
    grid = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading, justify in (
        ("", "left"),
        ("candidate", "left"),
        ("provider", "left"),
        ("size", "left"),
        ("ms", "right"),
    ):
        grid.add_column(heading, justify=justify)  # type: ignore[arg-type]
    grid.add_column("noise", justify="right")
    for trial in outcome.trials:
        row = trial.row
        figures = (
            (f"{row.median_ms:.1f}", f"{row.noise or 0:.1%}") if row.median_ms else (escape(row.error or "failed"), "")
        )
        grid.add_row("*" if trial.won else "", escape(row.variant), row.provider, row.size, *figures)
    return grid
