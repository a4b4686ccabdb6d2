"""deblur-export: a network becomes a verified bundle."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deblur_deploy.bundles.manifest import MANIFEST
from deblur_deploy.cli.arguments import parse_arguments
from deblur_deploy.cli.common import OK, guarded
from deblur_deploy.errors import InputError
from deblur_deploy.pipeline.artifact import Measured
from deblur_deploy.pipeline.bundle import build_bundle
from deblur_deploy.pipeline.config import Int8Config, NetworkConfig
from deblur_deploy.pipeline.pruning.config import PruneConfig, RecoverConfig
from deblur_deploy.pipeline.recipe import Recipe, read_recipe
from deblur_deploy.shipped import DEFAULT_CHECKPOINT

if TYPE_CHECKING:
    from deblur_deploy.evaluation.page import Table as PageTable


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Turn a restoration network into a verified bundle of ONNX models."""

    checkpoint: Annotated[
        Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT", help_behavior_hint="")
    ] = None
    """Weights that deblur-train wrote, somebody's .onnx, or a file of somebody's weights (.safetensors, .pth); without
    it, those that ship with the package."""
    out: Path
    """Folder of the bundle."""
    force: bool = False
    """Replace the folder if it exists; it is replaced only when everything is done."""
    cache: bool = True
    """Take what was made before from the cache ($DEBLUR_CACHE, or the user's own), and keep there what is made now."""
    json: bool = False
    """Print the result as JSON on standard output."""
    recipe_file: Annotated[Path | None, tyro.conf.arg(name="recipe-file", metavar="PATH", help_behavior_hint="")] = None
    """Take every choice from this recipe.toml instead of the options below."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)


USUAL = {
    Arguments: ("checkpoint", "out", "force", "recipe_file"),
    NetworkConfig: ("model",),
    Recipe: ("pairs", "calibration"),
    PruneConfig: ("macs", "target_ms", "at"),
    RecoverConfig: ("data",),
    Int8Config: ("max_drop_db",),
}


def parse(argv: Sequence[str] | None) -> Arguments:
    """Arguments of the command line; raises InputError on a mistake."""
    return parse_arguments(Arguments, "deblur-export", argv, usual=USUAL)


def run(arguments: Arguments) -> int:
    """Build the bundle and print the table."""
    recipe = arguments.recipe
    if arguments.recipe_file:
        if recipe != Recipe():
            raise InputError("--recipe-file comes with other choices; edit the file, or give the choices without it")
        recipe = read_recipe(arguments.recipe_file)
    log = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    # What somebody's network prints is not our result.
    with log.status("starting") as status, redirect_stdout(sys.stderr):

        def on_progress(what: str) -> None:
            status.update(escape(what))
            if not log.is_terminal:
                log.print(f"- {what}")

        results = build_bundle(
            arguments.checkpoint or (None if recipe.network.model else DEFAULT_CHECKPOINT),
            recipe,
            arguments.out,
            force=arguments.force,
            cached=arguments.cache,
            on_progress=on_progress,
        )
    if arguments.json:
        sys.stdout.write(json.dumps([result.row() for result in results], indent=2, allow_nan=False) + "\n")
    else:
        size = f"{recipe.verify.width_px}x{recipe.verify.height_px}"
        # A pipe or a log has no width of its own, and 80 columns would cut names.
        console = Console(width=None if sys.stdout.isatty() else 120, markup=False)
        pruning = json.loads((arguments.out / MANIFEST).read_text(encoding="utf-8")).get("pruning")
        if pruning:
            from deblur_deploy.pipeline.pruning.report import outcome, widths

            console.print(*map(as_grid, (widths(pruning), outcome(pruning))), sep="\n")
        console.print(table(results, size))
    log.print(f"bundle: {arguments.out}")
    return OK


def table(results: Sequence[Measured], size: str) -> Table:
    """One row a variant: size, quality, and latency with what really ran."""
    old = [f"{run_.provider} was timed on {run_.measured}" for run_ in results[0].runs if run_.cached]
    caption = f"From the cache: {', '.join(old)}; --no-cache times again" if old else None
    grid = Table(title=f"Latency: median at {size}, from image array to image array", caption=caption)
    grid.add_column("variant")
    for heading in ("MB", "PSNR blurry -> restored, dB", "to fp32, dB"):
        grid.add_column(heading, justify="right")
    for run_ in results[0].runs:
        grid.add_column(f"{run_.provider}, ms", justify="right")
    grid.add_column("really ran")
    for result in results:
        grid.add_row(
            result.artifact.name,
            f"{result.size_bytes / 1e6:.1f}",
            f"{result.quality.psnr_blurred:.2f} -> {result.quality.psnr:.2f}",
            f"{0 - result.drop_db:+.3f}",
            *(f"{there.median_ms:.1f}" if (there := result.on(of.provider)) else "" for of in results[0].runs),
            "; ".join(f"{run_.provider} in {run_.arithmetic}" for run_ in result.runs),
        )
    return grid


def as_grid(page_table: PageTable) -> Table:
    """A table of the report, for the terminal."""
    grid = Table(title=page_table.heading, caption=page_table.note or None)
    for index, name in enumerate(page_table.columns):
        grid.add_column(name, justify="right" if index else "left")
    for row in page_table.rows:
        grid.add_row(*row)
    return grid


def command(argv: Sequence[str] | None) -> int:
    """Parse and run."""
    return run(parse(argv))


main = guarded("deblur-export", command)

if __name__ == "__main__":
    sys.exit(main())
