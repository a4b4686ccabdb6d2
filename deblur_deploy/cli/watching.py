"""What a person sees of a run: a bar with loss, PSNR, images a second and time left; a line for each validation."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from deblur_deploy.training.bank import PIECE
from deblur_deploy.training.config import TrainConfig
from deblur_deploy.training.train import Progress

_MANY_DEAD = 0.2
_BUSY = 0.2
"""Share of the processors that others may take before it is worth a line."""


class Watcher:
    """Called with the progress after each step; a context, as the bar is one."""

    def __init__(self, console: Console, config: TrainConfig, done: int) -> None:
        self.console, self.every = console, config.log_every
        self.loss, self.psnr = 0.0, ""
        self.reported: set[str] = set()
        self.complained = False
        columns = (BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
        self.bar = Bar(*columns, console=console, speed_estimate_period=120, disable=not console.is_terminal)
        self.task = self.bar.add_task("train", total=config.steps, completed=done, text="starting")

    def __enter__(self) -> Watcher:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        if self.reported:
            self.console.print(f"{len(self.reported)} files could not be read and were skipped")

    def filling(self, made: int, of: int) -> None:
        """Patches are made ahead; training waits."""
        text = f"blurring {of} patches ahead: {made / of:.0%}"
        self.bar.update(self.task, text=text)
        # A line each fifth, where there is no bar.
        if not self.console.is_terminal and made * 5 // of != (made - PIECE) * 5 // of:
            self.console.print(text)

    def __call__(self, progress: Progress) -> None:
        self.loss = progress.loss if not self.loss else 0.98 * self.loss + 0.02 * progress.loss
        for path in sorted(progress.unreadable.keys() - self.reported):
            self.console.print(f"[yellow]skipped[/]: {escape(progress.unreadable[path])}", soft_wrap=True)
            self.reported.add(path)
        for name, result in progress.quality.items():
            text = (
                f"step {progress.step}: {name} {result.mean.psnr:.2f} dB ({result.mean.gain_db:+.2f}), "
                f"SSIM {result.mean.ssim:.4f}, worst image {result.worst_gain_db:+.2f} dB ({result.worst})"
            )
            self.console.print(escape(text), soft_wrap=True)
        if progress.dead is not None and progress.dead > _MANY_DEAD:
            text = f"{progress.dead:.0%} of the channels never fire and learn no more: lower --learning-rate"
            self.console.print(f"[yellow]note[/]: {text}", soft_wrap=True)
        if progress.processors and progress.processors.others > _BUSY and not self.complained:
            taken = f"{progress.processors.others:.0%} of the processors"
            text = f"other processes take {taken}, and each step waits for them"
            text += ": end or pause them, or set OMP_WAIT_POLICY=PASSIVE"
            self.console.print(f"[yellow]note[/]: {text}", soft_wrap=True)
            self.complained = True
        if progress.quality:
            mean = sum(result.mean.psnr for result in progress.quality.values()) / len(progress.quality)
            self.psnr = f", PSNR {mean:.2f}"
        text = f"loss {self.loss:.4f}{self.psnr}, {progress.images_per_s:.1f} images/s"
        self.bar.update(self.task, completed=progress.step, text=text)
        if not self.console.is_terminal and progress.step % self.every == 0:
            shares = progress.processors
            had = f", network {shares.network:.0%} of the processors, others {shares.others:.0%}" if shares else ""
            self.console.print(f"step {progress.step}: {text}, waiting for data {progress.waiting:.0%}{had}")
