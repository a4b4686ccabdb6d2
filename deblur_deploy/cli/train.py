"""``deblur-train``: photographs, pairs or frames go in, a checkpoint that ``deblur-export`` reads comes out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
import torch
import tyro
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deblur_deploy.cli.arguments import parse_arguments
from deblur_deploy.cli.common import INTERRUPTED, OK, guarded
from deblur_deploy.cli.watching import Watcher
from deblur_deploy.errors import InputError, check_bounds
from deblur_deploy.evaluation.quality import usable_pairs
from deblur_deploy.evaluation.sets import by_name
from deblur_deploy.files import refuse_existing, remove_leftovers
from deblur_deploy.shipped import DEFAULT_CHECKPOINT
from deblur_deploy.system.threads import usable_cores
from deblur_deploy.training.bank import Bank, bank_folder, stored_px
from deblur_deploy.training.batches import Batches
from deblur_deploy.training.blur import BlurConfig
from deblur_deploy.training.checkpoint import load_checkpoint
from deblur_deploy.training.config import Stage, TrainConfig, check_window
from deblur_deploy.training.discovery import Found, find_sources, inspect
from deblur_deploy.training.figures import as_pairs, before_after, learning_curve, preview
from deblur_deploy.training.grow import grown
from deblur_deploy.training.kernels import load_kernels
from deblur_deploy.training.sources import WINDOW, ImageCache
from deblur_deploy.training.train import FILES, Trainer, make_accelerator
from deblur_deploy.training.unet import PRESETS, Preset, UNet, parameter_count
from deblur_deploy.training.validation import PairSets, TorchRestorer


class TrainCommand(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Train or fine-tune a deblurring U-Net.

    Each INPUT is a folder of sharp photographs (searched with all folders below, blurred on the fly), a folder with
    pairs (sharp/NAME beside blur/NAME or blur_gamma/NAME, at any depth), a CSV file of pairs (two columns, blurred and
    sharp), or a high-frame-rate video. PATH=0.3 gives an input 30 % of the samples; inputs without a share divide the
    rest equally. Example: deblur-train photos/ gopro/train=0.3 --frames clip240.mp4=0.2 --val gopro/test --out run
    """

    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Photographs, pairs (folder or CSV) or videos; PATH or PATH=SHARE."""
    out: Path
    """Folder of the run: checkpoints, state, log.csv, figures."""
    frames: tuple[str, ...] = ()
    """Folders of consecutive frames (200 a second or more), or videos; an odd number of them averages to one blur."""
    video: tuple[str, ...] = ()
    """The same at any rate; blur is made along the motion between neighbours, found by optical flow."""
    frames_window: tuple[int, int] = WINDOW
    """Fewest and most frames that average to one blur."""
    val: tuple[Path, ...] = ()
    """Pairs to validate on, in the same layouts."""
    preset: Preset = "hd"
    """Which network; ignored with --init."""
    init: str | None = None
    """Fine-tune this checkpoint instead of starting anew; "shipped" is the one that comes with the package."""
    grow: Preset | None = None
    """With --init: go on in this larger network, which at first computes the same."""
    resume: bool = False
    """Go on where the run in --out stopped; give the same arguments as before."""
    force: bool = False
    """Replace a run that is already in --out."""
    preview: int = 0
    """Write a sheet of this many blurred/sharp samples to OUT/preview.png, and stop."""
    kernels: Path | None = None
    """Measured blur kernels: an .npz of (N, K, K) arrays, each centred on its mean."""
    vgg_weights: Path | None = None
    """VGG19 weights in torchvision's layout, for the perceptual loss."""
    cache_gb: float = 2.0
    """Memory for decoded images, all processes together."""
    bank_gb: float = 4.0
    """Disk for patches that are blurred ahead, in the cache folder (DEBLUR_CACHE moves it), for each process that
    trains; 0 makes each batch when it is needed, as is done on a GPU, which blurs by itself."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()
    blur: BlurConfig = BlurConfig()

    def __post_init__(self) -> None:
        if self.grow and not self.init:
            raise ValueError("grow is given without init; allowed: with --init, the network that grows")
        if self.resume and self.force:
            raise ValueError("resume is given with force; allowed: one of the two")
        check_window(self.frames_window)
        check_bounds(self, preview=(0, None), cache_gb=(0, None), bank_gb=(0, None))


PREVIEW, FRAMES = "preview.png", "frames"
"""What may be in the folder of a run before it begins: samples to look at, and unpacked videos."""

USUAL = {
    TrainCommand: (
        "inputs", "out", "frames", "video", "val", "preset", "init", "grow", "resume", "force", "preview",
    ),
    TrainConfig: ("steps", "stages", "learning_rate"),
}  # fmt: skip


def parse(argv: Sequence[str] | None) -> TrainCommand:
    """Command line to command; raises InputError if it does not make sense."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def stage(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Stage] | None:
        if info.type is not Stage:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="SHARE:PATCHESxSIDE",
            instance_from_str=lambda texts: Stage.parse(texts[0]),
            is_instance=lambda value: isinstance(value, Stage),
            str_from_instance=lambda value: [str(value)],
        )

    return parse_arguments(TrainCommand, "deblur-train", argv, usual=USUAL, registry=registry)


def run(command: TrainCommand, again: str = "deblur-train ... --resume") -> int:
    """Train as ``command`` says; ``again`` is the command line that resumes it.  Returns the exit status."""
    config, out = command.train, command.out
    if not command.resume and not command.preview and not _only_looked_at(out):
        refuse_existing(out, force=command.force)
    accelerator = make_accelerator(config)
    console = Console(quiet=not accelerator.is_main_process, highlight=False)
    accelerator.wait_for_everyone()
    found, batches = _data(command, accelerator)
    _tell(console, found, batches, banked=_banked(command, accelerator))
    if command.preview:
        preview(batches, command.preview, out / PREVIEW)
        console.print(escape(f"wrote {out / PREVIEW}: blurred left, sharp right of each pair"), soft_wrap=True)
        return OK
    sets = _validation(command.val)
    model = _network(command, console)
    trainer = Trainer(
        model, config, out, accelerator=accelerator, data_id=batches.identity(), vgg_weights=command.vgg_weights
    )
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    console.print(f"on {trainer.device} x {accelerator.num_processes}, {precision}, {config.steps} steps")
    if command.resume:
        trainer.load_state()
        console.print(f"resuming at step {trainer.step} of {config.steps}")
    elif accelerator.is_main_process:
        remove_leftovers(out / name for name in FILES)
        for name in ("state.safetensors", "best.safetensors", "last.safetensors", "log.csv"):
            (out / name).unlink(missing_ok=True)
    feed: Batches | Bank = batches
    if _banked(command, accelerator):
        feed = Bank(batches, bank_folder(), trainer.data_id, int(command.bank_gb * 2**30))
    with Watcher(console, config, trainer.step) as watcher:
        if isinstance(feed, Bank) and accelerator.is_main_process:
            feed.watch = watcher.filling
        trainer.run(feed, sets, watcher if accelerator.is_main_process else None)
    if trainer.step < config.steps:
        console.print(
            f"stopped at step {trainer.step}, everything is saved; go on with\n  {escape(again)}", soft_wrap=True
        )
        return INTERRUPTED
    if accelerator.is_main_process:
        learning_curve(out / "log.csv", out / "curve.png")
        batches.blur_here = True
        shown = sets or {"training": as_pairs(batches[config.steps])}
        before_after(TorchRestorer(trainer.averaged()), shown, out / "sheet.png")
        console.print(
            escape(f"wrote {out}: best.safetensors, last.safetensors, log.csv, curve.png, sheet.png"), soft_wrap=True
        )
    accelerator.end_training()
    return OK


def _only_looked_at(out: Path) -> bool:
    """Whether nothing but a preview is in ``out``, which may be a mount: training never replaces it as a whole."""
    with suppress(OSError):
        return {path.name for path in out.iterdir()} <= {PREVIEW, FRAMES}
    return False


def _banked(command: TrainCommand, accelerator: Accelerator) -> bool:
    """Whether patches are blurred ahead."""
    return command.bank_gb > 0 and accelerator.device.type == "cpu"


def _data(command: TrainCommand, accelerator: Accelerator) -> tuple[list[Found], Batches]:
    """What the inputs hold, and the batches that are made of it in this process."""
    config = command.train
    # A bank is filled by one process a core.
    readers = usable_cores() if _banked(command, accelerator) and config.workers else max(config.workers, 1)
    cache = ImageCache(int(command.cache_gb * 2**30) // (readers * accelerator.num_processes))
    with accelerator.main_process_first():
        found = find_sources(
            command.inputs,
            command.frames,
            command.video,
            frames_folder=command.out / FRAMES,
            cache=cache,
            window=command.frames_window,
            blur=command.blur,
        )
    batches = Batches(
        [pair for item in found for pair in item.weighted()],
        command.blur,
        config.schedule(),
        seed=config.seed,
        kernels=load_kernels(str(command.kernels), 2 * command.blur.margin_px + 1) if command.kernels else None,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    return found, batches


def _network(command: TrainCommand, console: Console) -> UNet:
    if command.init:
        path = DEFAULT_CHECKPOINT if command.init == "shipped" else Path(command.init)
        model, name = load_checkpoint(path), str(path)
        if command.grow:
            torch.manual_seed(command.train.seed)
            model, name = grown(model, PRESETS[command.grow]), f"{command.grow}, grown from {path}"
    else:
        torch.manual_seed(command.train.seed)
        model, name = UNet(PRESETS[command.preset]), command.preset
    size = f"{parameter_count(model) / 1e6:.2f} M parameters, {model.config.macs_per_pixel / 1e3:.1f} kMAC a pixel"
    console.print(escape(f"network {name}: {size}"), soft_wrap=True)
    return model


def _validation(paths: Sequence[Path]) -> PairSets:
    # Names what is no pair now, and not after the first thousand steps.
    sets = {name: usable_pairs(path) for name, path in by_name(paths).items()}
    for _, failed in sets.values():
        if failed:
            raise InputError(f"--val: {failed[0]}; mend or remove it")
    return {name: pairs for name, (pairs, _) in sets.items()}


def _tell(console: Console, found: Sequence[Found], batches: Batches, *, banked: bool) -> None:
    """What was found, and what is wrong with it."""
    table = Table("input", "kind", "files", "share", box=None, pad_edge=False)
    for item in found:
        count = sum(len(source.files()) for source in item.sources)
        table.add_row(escape(str(item.path)), item.kind, str(count), f"{item.share / sum(f.share for f in found):.0%}")
    console.print(table)
    for item in found:
        if item.note:
            _note(console, item.note)
    side = max(side for _, _, side in batches.stages)
    side = stored_px(side) if banked else side
    seen = inspect(batches.sources, side, batches.blur.margin_px)
    if seen.small:
        wanted = (
            f"the {side} px that a patch is cut from (plus {batches.blur.margin_px} px of margin where blur is made)"
        )
        _note(
            console,
            f"{len(seen.small)} of {seen.files} images are smaller than {wanted}, first {seen.small[0]}; "
            "they are used, filled up by reflection",
        )
    if seen.unreadable:
        first = f"first {seen.unreadable[0]}"
        _note(console, f"{len(seen.unreadable)} of {seen.files} files are no readable images and are skipped, {first}")


def _note(console: Console, text: str) -> None:
    console.print(f"[yellow]note[/]: {escape(text)}", soft_wrap=True)


def command(argv: Sequence[str] | None) -> int:
    """Parse and run."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("--force", "--resume")]
    return run(parse(argv), shlex.join(["deblur-train", *words, "--resume"]))


main = guarded("deblur-train", command)

if __name__ == "__main__":
    sys.exit(main())
