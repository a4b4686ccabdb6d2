"""What pruning costs and brings: PSNR against multiply-accumulates and against measured int8 latency.

    python benchmarks/pruning.py --data PHOTOS... --frames CLIP... --val PAIRS... --work FOLDER --steps 1000

For each share of the multiply-accumulates: the pruned network before recovery, after it, and the honest rival, the same
widths trained from scratch for as many steps on the same batches.  Beside them the dense network, as it is and, with
``--longer``, trained on for as many steps, since recovery is further training too.  No step is chosen by the pairs that
are reported: each run counts as it ends.  Every network is kept in the work folder, so a second run goes on where the
first stopped.  The shipped network's record is ``pruning.json``, that of another checkpoint ``pruning-NAME.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
from common import PROVIDERS, Options, present, progress, save, script
from tables import pruning_table

from deblur_deploy.errors import InputError
from deblur_deploy.evaluation import plots
from deblur_deploy.evaluation.latency import at_size, take_turns
from deblur_deploy.evaluation.quality import PairSet, Quality, Restorer, mean_quality, measure
from deblur_deploy.evaluation.record import Row, new_record
from deblur_deploy.evaluation.sets import by_name
from deblur_deploy.files import sha256, writing_file
from deblur_deploy.pipeline.config import Int8Config
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.int8.quantizer import plain_int8
from deblur_deploy.pipeline.photos import builtin_pairs, calibration_from
from deblur_deploy.pipeline.pruning.config import Importance, PruneConfig, RecoverConfig
from deblur_deploy.pipeline.pruning.fit import int8_layout
from deblur_deploy.pipeline.pruning.prune import network_of, plan_for, sensitivity, sizes
from deblur_deploy.pipeline.pruning.recover import banked, batches_for, recover, samples_for
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.shipped import DEFAULT_CHECKPOINT
from deblur_deploy.training.checkpoint import load_checkpoint, save_checkpoint
from deblur_deploy.training.config import Kind, TrainConfig
from deblur_deploy.training.train import Progress, Trainer
from deblur_deploy.training.unet import UNet
from deblur_deploy.training.validation import TorchRestorer

SIZE = (1280, 720)
FRESH = TrainConfig()
"""A fresh network is trained as deblur-train would: it takes a higher learning rate than a trained one."""


@dataclass(frozen=True, kw_only=True)
class Pruning(Options):
    """Prune, recover, train the rivals, compare."""

    checkpoint: Path = DEFAULT_CHECKPOINT
    """Weights of the dense network."""
    data: tuple[str, ...] = ()
    """Photographs, pairs or videos, as deblur-train takes them; without any, the built-in ones."""
    frames: tuple[str, ...] = ()
    """Consecutive frames, as deblur-train takes them."""
    video: tuple[str, ...] = ()
    """The same at any rate."""
    frames_window: tuple[int, int] = RecoverConfig().frames_window
    """Fewest and most frames that average to one blur."""
    val: tuple[Path, ...] = ()
    """Pairs to measure on; without any, the built-in ones."""
    work: Path = Path("pruning-work")
    """Folder of the networks; what is in it is not trained again."""
    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    """Shares of the multiply-accumulates to keep."""
    steps: int = 1000
    """Training steps of each network."""
    patches: int = 8
    """Patches in a batch."""
    side_px: int = 256
    """Height and width of a patch."""
    loss: str = RecoverConfig().loss
    """Of every network that is trained here."""
    optimizer: Kind = RecoverConfig().optimizer
    """Of recovery, and of the dense network that is trained on."""
    learning_rate: float = RecoverConfig().learning_rate
    """Of the same."""
    bank_gb: float = RecoverConfig().bank_gb
    """Disk for patches that are blurred ahead."""
    seed: int = 0
    """Of data order and blur."""
    scratch: bool = True
    """Train the same widths from scratch, which takes as long again."""
    longer: bool = False
    """Train the dense network on, too."""
    importance: Importance = "taylor"
    """Which channels go first."""
    workers: int = 1
    """Processes that make batches ahead."""
    rounds: int = 30
    """Timed calls of each network on each provider."""

    def training(self) -> RecoverConfig:
        """How every network is trained."""
        steps = min(self.steps, 4) if self.quick else self.steps
        side = min(self.side_px, 64) if self.quick else self.side_px
        return RecoverConfig(
            data=self.data,
            frames=self.frames,
            video=self.video,
            frames_window=self.frames_window,
            bank_gb=self.bank_gb,
            seed=self.seed,
            steps=steps,
            patches=self.patches,
            side_px=side,
            loss=self.loss,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            workers=self.workers,
        )


def run(options: Pruning) -> int:
    """Train, measure and save."""
    on_progress, notes, how = progress(), list[str](), PruneConfig(macs=1.0, importance=options.importance)
    config, dense = options.training(), load_checkpoint(options.checkpoint)
    fresh = msgspec.structs.replace(config, optimizer=FRESH.optimizer, learning_rate=FRESH.learning_rate)
    _claim(options, how, config)
    if config.weak:
        notes.append("trained on five built-in photographs only: a weak recovery, and a weak rival")
    samples = samples_for(config, options.work, 2 if options.quick else 8)
    plan = plan_for(dense, how, samples)
    for share in options.shares:
        plan.widths(share)  # what is out of reach is said before anything is trained
    nets: dict[tuple[float, str], UNet] = {(1.0, "dense"): dense}
    recovering = _saying(on_progress)
    for share in options.shares:
        pruned = nets[share, "pruned"] = network_of(plan, share)
        on_progress(f"recovering at {share:.0%}")
        folder = options.work / f"recovered-{share:g}"
        nets[share, "recovered"] = recover(pruned, dense, config, folder, {}, recovering).unet
        if options.scratch:
            on_progress(f"from scratch at {share:.0%}")
            torch.manual_seed(config.seed)
            nets[share, "scratch"] = _train(UNet(pruned.config), fresh, options.work / f"scratch-{share:g}")
    if options.longer:
        on_progress("the dense network, trained on")
        again = load_checkpoint(options.checkpoint)
        nets[1.0, "trained on"] = _train(again, config, options.work / "dense-longer")
    for (share, kind), net in nets.items():
        save_checkpoint(net, options.work / f"{kind.replace(' ', '-')}-{share:g}.safetensors")

    sets = {name: list(PairSet(path)) for name, path in by_name(options.val).items()} or {"builtin": builtin_pairs()}
    rows: list[Row] = []
    for (share, kind), net in nets.items():
        on_progress(f"quality of {kind} at {share:.0%}")
        rows.append(_row(options, share, kind, "torch", net, _quality(TorchRestorer(net), sets)))
    timed = {share: nets[share, "dense" if share == 1 else "recovered"] for share in (1.0, *options.shares)}
    for provider in present(PROVIDERS, notes):
        rows += _deployed(options, provider, timed, sets, on_progress)
    found = {
        "widths": {str(share): sizes(dense, net)["widths"] for share, net in timed.items() if share < 1},
        "sensitivity": {
            name: {str(gone): psnr for gone, psnr in curve.items()}
            for name, curve in sensitivity(plan, samples).items()
        },
        "summary": _summary(rows),
    }
    shipped = sha256(options.checkpoint) == sha256(DEFAULT_CHECKPOINT)
    name = "pruning" if shipped else f"pruning-{options.checkpoint.stem}"
    _draw(options.out / name, rows, found["sensitivity"])
    names = {kind: tuple(Path(text).name for text in getattr(config, kind)) for kind in ("data", "frames", "video")}
    settings = options.settings(
        checkpoint=options.checkpoint.stem,
        checkpoint_sha256=sha256(options.checkpoint),
        prune={name: getattr(how, name) for name in ("importance", "multiple", "balance")},
        training=msgspec.to_builtins(msgspec.structs.replace(config, **names)),
        scratch={"optimizer": fresh.optimizer, "learning_rate": fresh.learning_rate} if options.scratch else None,
        sets={name: [pair.name for pair in pairs] for name, pairs in sets.items()},
    )
    record = new_record(name, settings, notes=notes, rows=rows, found=found)
    record.found["tables"] = [msgspec.to_builtins(pruning_table(record))]
    return save(record, options)


def _claim(options: Pruning, how: PruneConfig, config: RecoverConfig) -> None:
    """The work folder belongs to one checkpoint, one way to prune and one to train; raises InputError for another's."""
    mine = msgspec.json.encode([sha256(options.checkpoint), how, msgspec.structs.replace(config, workers=0)])
    path = options.work / "settings.json"
    if not path.exists():
        with writing_file(path) as temporary:
            temporary.write_bytes(mine)
    elif path.read_bytes() != mine:
        raise InputError(
            f"{options.work} holds networks of another checkpoint or other settings; choose another --work"
        )


def _saying(on_progress: Callable[[str], None]) -> Callable[[Progress], None]:
    def watch(now: Progress) -> None:
        if now.step % 50 == 0:
            on_progress(f"step {now.step}, loss {now.loss:.4f}, {now.images_per_s:.1f} patches a second")

    return watch


def _train(unet: UNet, config: RecoverConfig, folder: Path) -> UNet:
    """Ordinary training for as many steps as recovery has, on the same batches."""
    training = config.training(config.steps)
    trainer = Trainer(unet, training, folder)
    if (folder / "state.safetensors").exists():
        trainer.load_state()
    feed = banked(batches_for(config, training, folder), config, trainer.device)
    trainer.run(feed, {}, _saying(progress()))
    if trainer.step < training.steps:
        raise KeyboardInterrupt
    return load_checkpoint(folder / "last.safetensors")


def _quality(restorer: Restorer, sets: dict[str, Any]) -> dict[str, Quality]:
    return {name: mean_quality(measure(restorer, pair) for pair in pairs) for name, pairs in sets.items()}


def _row(
    options: Pruning, share: float, kind: str, provider: str, net: UNet, quality: dict[str, Quality], **more: Any
) -> Row:
    facts = {
        "share": share,
        "macs_per_pixel": net.config.macs_per_pixel,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "psnr": {name: result.psnr for name, result in quality.items()},
    }
    return Row(
        model=f"{options.checkpoint.stem} {share:.0%}",
        variant=kind,
        provider=provider,
        size="x".join(map(str, SIZE)),
        # The mean over sets, not over pairs: a large set must not drown a small one.
        psnr_blurred=fmean(result.psnr_blurred for result in quality.values()),
        psnr=fmean(result.psnr for result in quality.values()),
        ssim=fmean(result.ssim for result in quality.values()),
        facts=facts | more.pop("facts", {}),
        **more,
    )


def _deployed(
    options: Pruning, provider: str, nets: dict[float, UNet], sets: dict[str, Any], on_progress: Callable[[str], None]
) -> Iterator[Row]:
    """int8 of each network on one provider: quality, and latency in turn."""
    # As an export does.
    photos = list(calibration_from(None, Int8Config().tiles).values())
    photo = at_size(builtin_pairs()[0].blurred, *SIZE)
    with TemporaryDirectory() as folder:
        engines: dict[float, DeblurEngine] = {}
        for share, net in nets.items():
            on_progress(f"int8 at {share:.0%} on {provider}")
            path = Path(folder, str(share))
            path.mkdir()
            file = plain_int8(Exporter.of(net, "0" * 64, path), photos, Int8Config(), int8_layout(provider)).path
            engines[share] = DeblurEngine(file, provider=provider, threads=options.threads)
        calls = {str(share): lambda engine=engine: engine(photo) for share, engine in engines.items()}
        timings = take_turns(calls, rounds=3 if options.quick else options.rounds)
        for share, engine in engines.items():
            kind, timing = "dense" if share == 1 else "recovered", timings[str(share)]
            yield _row(
                options,
                share,
                f"{kind}, int8",
                provider,
                nets[share],
                _quality(engine, sets),
                median_ms=timing.median_ms,
                p95_ms=timing.p95_ms,
                best_ms=timing.best_ms,
                calls=timing.calls,
                noise=timing.noise,
                facts={"arithmetic": engine.receipt.effective_precision},
            )
            engine.close()


def _summary(rows: list[Row]) -> list[dict[str, Any]]:
    """Each share against the dense network: what is lost, what is gained."""
    at = {(row.facts["share"], row.variant, row.provider): row for row in rows}
    providers = dict.fromkeys(row.provider for row in rows if row.median_ms)
    summary = []
    for share in sorted({row.facts["share"] for row in rows} - {1.0}, reverse=True):
        line: dict[str, Any] = {"share": share}
        dense = at[1.0, "dense", "torch"].psnr or 0
        for kind in ("pruned", "recovered", "scratch"):
            if row := at.get((share, kind, "torch")):
                line[f"{kind}_db"] = (row.psnr or 0) - dense
        if longer := at.get((1.0, "trained on", "torch")):
            line["recovered_to_trained_on_db"] = line["recovered_db"] + dense - (longer.psnr or 0)
        for provider in providers:
            slow, fast = at[1.0, "dense, int8", provider], at[share, "recovered, int8", provider]
            line[f"{provider}_speedup"] = (slow.median_ms or 0) / (fast.median_ms or 1)
            line[f"{provider}_int8_db"] = (fast.psnr or 0) - (slow.psnr or 0)
        summary.append(line)
    return summary


def _draw(record: Path, rows: list[Row], sensitive: dict[str, dict[str, float]]) -> None:
    """The curves, beside the record."""
    by_macs: dict[str, dict[float, float]] = {}
    by_ms: dict[str, dict[float, float]] = {}
    for row in rows:
        if row.provider == "torch":
            by_macs.setdefault(row.variant, {})[row.facts["macs_per_pixel"] / 1000] = row.psnr or 0
        elif row.median_ms:
            by_ms.setdefault(f"int8 on {row.provider}", {})[row.median_ms] = row.psnr or 0
    # The dense network is where each curve begins.
    dense = by_macs.pop("dense")
    by_macs = {name: values if name == "trained on" else dense | values for name, values in by_macs.items()}
    layers = {name: {100 * float(gone): psnr for gone, psnr in curve.items()} for name, curve in sensitive.items()}
    figures = {
        "macs": plots.curves(by_macs, "kMAC per pixel", "PSNR, dB"),
        "latency": plots.curves(by_ms, f"latency at {SIZE[0]}x{SIZE[1]}, ms", "PSNR, dB") if by_ms else "",
        "sensitivity": plots.curves(layers, "channels removed from one layer, %", "PSNR, dB"),
    }
    for name, svg in figures.items():
        if svg:
            with writing_file(record.with_name(f"{record.name}_{name}.svg")) as temporary:
                temporary.write_text(plots.for_file(svg))


if __name__ == "__main__":
    script(Pruning, run)
