"""The stages between a checkpoint and its export that make the network smaller: fit, prune, recover, compare.

As in ``pipeline.bundle``, what a stage does is imported only when it is really done.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from deblur_deploy.errors import MissingFileError, ModelError
from deblur_deploy.evaluation.machine import package_versions, this_machine
from deblur_deploy.evaluation.pairs import find_pairs
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.files import sha256
from deblur_deploy.pipeline.doors.source import Source
from deblur_deploy.pipeline.inputs import DECODERS, Photos
from deblur_deploy.pipeline.pruning.config import WEAK, PruneConfig, RecoverConfig
from deblur_deploy.pipeline.stages import Done, Record, Stages, digest, to_record
from deblur_deploy.wheels import versions

_PRUNE, _RECOVER, _FIT = (f"deblur_deploy.pipeline.pruning.{name}" for name in ("prune", "recover", "fit"))
_VALIDATION, _PHOTOS = "deblur_deploy.training.validation", "deblur_deploy.pipeline.photos"
PRUNED = "pruned.safetensors"


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """A network after pruning, or as it was."""

    source: Source
    record: Record
    """What there is to say about pruning."""
    file: Path | None = None
    """The pruned network, for the bundle."""


@dataclass(frozen=True, kw_only=True)
class Shrinking:
    """Makes the network of one checkpoint smaller, as ``config`` says."""

    stages: Stages
    checkpoint: Path
    parent: str
    """SHA-256 of the checkpoint."""
    config: PruneConfig
    pairs: Photos[Pair]
    """Validation says by them which step of recovery was the best."""

    def run(self) -> tuple[Path, Record]:
        """The new checkpoint, and what there is to say about it.

        Raises InputError for a target that is out of reach, and KeyboardInterrupt, with everything saved for the next
        run, if a signal asks to stop.
        """
        config, notes = self.config, list[str]()
        share, record = config.macs or config.parameters or 1.0, Record()
        if config.target_ms is not None:
            record["fit"] = self._fit().record
            share = record["fit"]["share"]
            notes += [record["fit"]["note"]] if record["fit"]["note"] else []
        recovers = bool(config.recover.steps or config.recover.minutes)
        if config.recover.weak and recovers:
            notes.append(WEAK)
        current, pruned = self.checkpoint, self.checkpoint
        for number in range(1, config.rounds + 1):
            pruned_now = self._prune(current, share ** (number / config.rounds), share, number)
            record.setdefault("sensitivity", pruned_now.record["sensitivity"])
            current = pruned = pruned_now.folder / PRUNED
            if recovers and not pruned_now.record["unchanged"]:
                done = self._recover(current, number)
                current, record["recovery"] = done.folder / PRUNED, done.record
        compared, latency = self._compare(pruned, current).record, self._latency(current).record
        notes += config.missed(latency["ms"])
        for note in notes:
            self.stages.on_progress(f"note: {note}")
        return current, {**record, **compared, "latency": latency, "notes": notes}

    def _fit(self) -> Done:
        def make(_: Path) -> Record:
            from deblur_deploy.pipeline.pruning.fit import fit
            from deblur_deploy.pipeline.pruning.prune import plan_for
            from deblur_deploy.pipeline.pruning.recover import samples_for
            from deblur_deploy.training.checkpoint import load_checkpoint
            from deblur_deploy.training.unet import UNet

            def measure(unet: UNet) -> float:
                ms = self._timed([unet])[0]
                self.stages.on_progress(f"{unet.config.macs_per_pixel / 1000:.1f} kMAC per pixel take {ms:.1f} ms")
                return ms

            samples = samples_for(self.config.recover, self.stages.work)
            plan = plan_for(load_checkpoint(self.checkpoint), self.config, samples)
            assert self.config.target_ms is not None
            return to_record(fit(plan, self.config.target_ms, measure))

        return self.stages.run(
            f"fit to {self.config.target_ms:g} ms",
            make,
            code=(_FIT, _RECOVER),
            inputs={"checkpoint": self.parent, "data": data_digest(self.config.recover)},
            config={**self._importance(), **self._target(), "target_ms": self.config.target_ms},
            environment={**package_versions(), **this_machine(), **_computing()},
        )

    def _timed(self, nets: Sequence[Any]) -> list[float]:
        """Milliseconds of each network, from the cache if networks of these widths were timed before."""

        def make(_: Path) -> Record:
            from deblur_deploy.pipeline.photos import builtin_calibration
            from deblur_deploy.pipeline.pruning.fit import time_exported

            return {"ms": [timing.median_ms for timing in time_exported(nets, self.config, builtin_calibration())]}

        done = self.stages.run(
            "latency of " + " and ".join(f"{net.config.macs_per_pixel / 1000:.2f} kMAC per pixel" for net in nets),
            make,
            code=(_FIT,),
            inputs={str(number): digest(msgspec.to_builtins(net.config)) for number, net in enumerate(nets)},
            config=self._target(),
            environment={**package_versions(), **this_machine()},
        )
        return list(done.record["ms"])

    def _prune(self, source: Path, share: float, last: float, number: int) -> Done:
        """``source``, a network of an earlier round, brought to ``share`` of the checkpoint's cost.

        ``last``: where the last round will end; the first one says if that is out of reach.
        """

        def make(folder: Path) -> Record:
            from deblur_deploy.pipeline.pruning.prune import cost_of, network_of, plan_for, sensitivity
            from deblur_deploy.pipeline.pruning.recover import samples_for
            from deblur_deploy.training.checkpoint import load_checkpoint, save_checkpoint

            dense, unet = load_checkpoint(self.checkpoint), load_checkpoint(source)
            samples = samples_for(self.config.recover, self.stages.work)
            plan = plan_for(unet, self.config, samples)
            if number == 1:
                plan.widths(last)
            left = share * cost_of(dense, plan.target) / cost_of(unet, plan.target)
            small = network_of(plan, min(left, 1.0))
            save_checkpoint(small, folder / PRUNED)
            found = to_record(sensitivity(plan, samples[:2])) if number == 1 else {}
            return {"sensitivity": found, "unchanged": small.config == unet.config}

        return self.stages.run(
            f"prune, round {number} of {self.config.rounds}",
            make,
            code=(_PRUNE, _RECOVER),
            inputs={"checkpoint": self.parent, "from": sha256(source), "data": data_digest(self.config.recover)},
            config={
                **self._importance(),
                "share": share,
                "last": last,
                "of": "parameters" if self.config.parameters else "macs",
            },
            environment=_computing(),
        )

    def _recover(self, source: Path, number: int) -> Done:
        rounds, how = self.config.rounds, self.config.recover
        minutes = how.minutes / rounds if how.minutes else None
        how = msgspec.structs.replace(how, steps=-(-how.steps // rounds), minutes=minutes, seed=how.seed + number - 1)

        def make(folder: Path) -> Record:
            from deblur_deploy.pipeline.pruning.recover import recover
            from deblur_deploy.training.bank import PIECE
            from deblur_deploy.training.checkpoint import load_checkpoint, save_checkpoint
            from deblur_deploy.training.train import Progress

            def watch(now: Progress) -> None:
                if now.step % 20 == 0 or now.quality:
                    psnr = "".join(f", PSNR {row.mean.psnr:.2f} dB" for row in now.quality.values())
                    self.stages.on_progress(f"recovery, step {now.step}: loss {now.loss:.4f}{psnr}")

            def filling(made: int, of: int) -> None:
                if made * 10 // of > (made - PIECE) * 10 // of:
                    self.stages.on_progress(f"recovery: {made / of:.0%} of {of} patches are blurred ahead")

            dense, unet = load_checkpoint(self.checkpoint), load_checkpoint(source)
            run, sets = folder / "run", {"pairs": self.pairs.images}
            try:
                done = recover(unet, dense, how, run, sets, watch, filling)
            except ModelError as error:
                self.stages.on_progress(f"recovery: what an interrupted run left is damaged ({error}); begun again")
                shutil.rmtree(run)
                done = recover(unet, dense, how, run, sets, watch, filling)
            save_checkpoint(done.unet, folder / PRUNED)
            shutil.rmtree(run, ignore_errors=True)
            return {"steps": done.steps, "seconds": round(done.seconds, 1)}

        return self.stages.run(
            f"recover, round {number} of {rounds}",
            make,
            code=(_RECOVER,),
            inputs={
                "checkpoint": self.parent,
                "from": sha256(source),
                "data": data_digest(how),
                "pairs": self.pairs.digest,
            },
            # Of the data, what it is counts and not where it lies; loader processes only make batches sooner.
            config=msgspec.structs.replace(how, workers=0, data=(), frames=(), video=()),
            environment=_computing(),
            resumes=True,
        )

    def _compare(self, pruned: Path, recovered: Path) -> Done:
        def make(_: Path) -> Record:
            from deblur_deploy.pipeline.pruning.prune import sizes
            from deblur_deploy.training.checkpoint import load_checkpoint
            from deblur_deploy.training.validation import validate

            nets = {"dense": self.checkpoint, "pruned": pruned, "recovered": recovered}
            loaded = {name: load_checkpoint(path) for name, path in nets.items()}
            psnr = {name: validate(net, {"": self.pairs.images})[""].mean.psnr for name, net in loaded.items()}
            return {"psnr": psnr, **sizes(loaded["dense"], loaded["recovered"])}

        return self.stages.run(
            "dense, pruned and recovered",
            make,
            code=(_PRUNE, _VALIDATION, _PHOTOS),
            inputs={
                "checkpoint": self.parent,
                "pruned": sha256(pruned),
                "recovered": sha256(recovered),
                "pairs": self.pairs.digest,
            },
            environment=_computing(),
        )

    def _latency(self, recovered: Path) -> Done:
        """The dense and the pruned network, timed in turn."""

        def make(_: Path) -> Record:
            from deblur_deploy.training.checkpoint import load_checkpoint

            dense_ms, ms = self._timed([load_checkpoint(self.checkpoint), load_checkpoint(recovered)])
            return {"dense_ms": dense_ms, "ms": ms, **self._target()}

        return self.stages.run(
            "latency before and after pruning",
            make,
            code=(_FIT,),
            inputs={"checkpoint": self.parent, "pruned": sha256(recovered)},
            config=self._target(),
            environment={**package_versions(), **this_machine()},
        )

    def _target(self) -> Record:
        return {"provider": self.config.provider, "precision": self.config.precision, "at": self.config.at}

    def _importance(self) -> Record:
        return {
            "importance": self.config.importance,
            "multiple": self.config.multiple,
            "balance": self.config.balance,
            "seed": self.config.recover.seed,
            "frames_window": self.config.recover.frames_window,
        }


def data_digest(config: RecoverConfig) -> str:
    """Names the files that recovery trains on by name, size and time, wherever they lie, and their shares.

    To read all of them could take minutes.  Raises MissingFileError for a path that is not there.
    """
    whole = hashlib.sha256()
    for kind in ("data", "frames", "video"):
        for text in getattr(config, kind):
            name, _, share = (text, "", "") if Path(text).exists() else text.rpartition("=")
            root = Path(name or text)
            if not root.exists():
                raise MissingFileError(f"no such file or folder: {root}")
            whole.update(f"{kind} {share}\n".encode())
            listed = [path for pair in find_pairs(root) for path in pair] if root.suffix.lower() == ".csv" else []
            for path in sorted(root.rglob("*")) if root.is_dir() else [root, *listed]:
                if path.is_file():
                    stat = path.stat()
                    inside = path.relative_to(root).as_posix() if root in path.parents else path.name
                    whole.update(f"{inside} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return whole.hexdigest()


def _computing() -> Record:
    """What decides the numbers that training gives."""
    return {**DECODERS, **versions("torch", "torch-pruning", "accelerate"), "processor": this_machine()["processor"]}
