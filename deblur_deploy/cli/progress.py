"""The bar that deblur-run shows: how many are done, how fast, and how long it still takes."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


def bar(console: Console) -> Progress:
    """A bar for tasks that have the field ``rate``."""
    # Names of files are no markup.
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, TextColumn("{task.fields[rate]}"), console=console)


def advance(progress: Progress, task: TaskID) -> None:
    """One more is done."""
    speed = progress.tasks[task].speed
    progress.update(task, advance=1, rate=f"{speed:.1f}/s" if speed else "")
