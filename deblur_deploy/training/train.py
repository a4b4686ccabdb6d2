"""Training: Muon or Adam, warm-up and cosine, averaged weights, patches that grow, and a state that resumes exactly."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import msgspec
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from deblur_deploy.errors import InputError, ModelError, TrainingError
from deblur_deploy.files import existing, remove_leftovers
from deblur_deploy.training.bank import Bank
from deblur_deploy.training.batches import Batch, Batches
from deblur_deploy.training.checkpoint import save_checkpoint, save_tensors
from deblur_deploy.training.config import TrainConfig, uses_bf16
from deblur_deploy.training.failures import told
from deblur_deploy.training.log import Clock, Log, Processors
from deblur_deploy.training.losses import parse_loss
from deblur_deploy.training.optimizer import Optimizer, averaging
from deblur_deploy.training.supervision import Supervised
from deblur_deploy.training.unet import UNet
from deblur_deploy.training.units import dead_share
from deblur_deploy.training.validation import PairSets, SetQuality, identity, validate
from deblur_deploy.training.winograd import Winograd


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is, after every step."""

    step: int
    loss: float
    """Of this step."""
    images_per_s: float
    """Patches a second since the last log line."""
    waiting: float
    """Share of that time spent waiting for data."""
    processors: Processors | None = None
    """Who had the machine's processors meanwhile; None where that cannot be told."""
    quality: dict[str, SetQuality] = field(default_factory=dict)
    """The validation, on the steps that had one."""
    dead: float | None = None
    """Share of the channels that never fire, on the steps that had a validation."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Files that turned out not to be readable so far, and why."""


FILES = ("state.safetensors", "last.safetensors", "best.safetensors", "log.csv", "curve.png", "sheet.png")
"""What a run writes."""


class Trainer:
    """One run in one folder: ``state.safetensors`` (to resume), ``last`` and ``best`` checkpoints, ``log.csv``."""

    def __init__(
        self,
        model: UNet,
        config: TrainConfig,
        out: Path,
        *,
        accelerator: Accelerator | None = None,
        data_id: str = "",
        vgg_weights: Path | None = None,
        supervised: Supervised | None = None,
    ) -> None:
        """``data_id`` names the data, so that ``load_state`` can refuse to go on with other data.

        ``supervised``: what is trained around ``model``, where that is more than the config asks for.
        """
        self.config, self.out, self.data_id = config, out, data_id
        self.accelerator = accelerator or make_accelerator(config)
        self.device = self.accelerator.device
        self.plain = model.to(self.device)
        self.ema = AveragedModel(self.plain, multi_avg_fn=averaging(config.ema))
        supervised = supervised or Supervised(self.plain, multi_scale=config.multi_scale > 0)
        self.supervised = supervised.to(self.device)
        # channels_last, since convolutions on every device are fastest so; mypy does not know this form of ``to``.
        cast("nn.Module", self.supervised).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = Optimizer(
            config.optimizer,
            self.supervised.parameters(),
            rate=config.learning_rate,
            weight_decay=config.weight_decay,
            first=self.plain.first,
        )
        self.model: nn.Module = self.accelerator.prepare_model(self.supervised)
        self.loss = parse_loss(config.loss, vgg_weights).to(self.device)
        self.step = 0
        self.best_gain = -math.inf
        self._judged: list[object] = []
        self._stop = self._asked_to_stop = False

    def run(
        self, batches: Batches | Bank, sets: PairSets, watch: Callable[[Progress], None] | None = None
    ) -> dict[str, SetQuality]:
        """Train to the last step, or until a signal asks to stop; returns the last validation.

        ``step`` tells afterwards how far it came.  Raises TrainingError, with the last good state on disk, if the loss
        is not finite, if memory does not suffice or if a loader process was killed.
        """
        config, quality = self.config, dict[str, SetQuality]()
        main = self.accelerator.is_main_process
        if isinstance(batches, Batches):
            batches.blur_here = self.device.type != "cuda"
        else:
            batches.stopping = lambda: self._asked_to_stop
        log = Log(self.out / "log.csv", list(sets), from_step=self.step) if main else None
        self._judge_by(sets)
        loader = batches.load(self.step, config.steps, config.workers)
        saved, clock = time.monotonic(), Clock()
        with self._listening(), told(lambda: batches.shape(self.step)):
            while self.step < config.steps and not self._stop:
                with clock.waiting():
                    batch = next(loader, None)
                if batch is None:  # asked to stop while the bank was filled
                    if main:
                        self.save_state()
                    break
                batch = batch.finished(batches.blur, self.device)
                loss = self._train_step(batch)
                clock.images += batches.shape(self.step - 1)[0]
                clock.losses.append(loss)
                last = self.step == config.steps
                due = main and (last or self.step % config.validate_every == 0)
                with clock.paused():
                    checked = validate(self.averaged(), sets, config.validate_px) if due else {}
                    dead = dead_share(self.averaged(), batch.blurred.float() / 255) if due else None
                quality = checked or quality
                if due:
                    self._keep_best(checked)
                if watch:
                    watch(
                        Progress(
                            step=self.step,
                            loss=loss,
                            images_per_s=clock.images_per_s,
                            waiting=clock.share_waiting,
                            processors=clock.processors() if self.step % config.log_every == 0 else None,
                            quality=checked,
                            dead=dead,
                            unreadable=batch.unreadable,
                        )
                    )
                if log and (self.step % config.log_every == 0 or due):
                    log.write(self.step, config.rate(self.step - 1), clock, checked, dead)
                    clock = Clock()
                if main and (time.monotonic() - saved > config.save_every_s or last or self._stop):
                    self.save_state()
                    saved = time.monotonic()
        return quality

    def averaged(self) -> UNet:
        """The averaged weights, ready to measure or save."""
        return cast("UNet", self.ema.module).eval()

    def _train_step(self, batch: Batch) -> float:
        blurred, sharp = (
            images.float().div(255).contiguous(memory_format=torch.channels_last)
            for images in (batch.blurred, batch.sharp)
        )
        self.plain.train()
        with Winograd():
            images = self.model(blurred)
            loss = self.supervised.loss([image.float() for image in images], sharp, self.loss, self.config.multi_scale)
        self.accelerator.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.supervised.parameters(), self.config.clip_norm)
        value = self._agreed(loss.detach())
        if not math.isfinite(value) or not math.isfinite(norm.item()):
            names, last = ", ".join(sorted(set(batch.names))), self.out / "last.safetensors"
            kept = f", and start from the last good weights, {last}" if last.exists() else ""
            raise TrainingError(
                f"loss is {value} and the gradient's norm {norm.item()} at step {self.step}; lower the learning rate"
                f"{kept}. The batch was made of {names}"
            )
        self.optimizer.step(self.config.rate(self.step))
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.plain)
        self.step += 1
        return value

    def _agreed(self, loss: Tensor) -> float:
        """The loss over all processes; also lets them stop at the same step."""
        if self.accelerator.num_processes == 1:
            self._stop = self._asked_to_stop
            return loss.item()
        both = torch.stack([loss, loss.new_tensor(float(self._asked_to_stop))])
        mean, asked = cast("Tensor", self.accelerator.reduce(both, "mean")).tolist()
        self._stop = asked > 0
        return float(mean)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step that is under way; a second one ends it at once."""
        self._asked_to_stop = self._stop = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(_number: int, _frame: object) -> None:
            if self._asked_to_stop:
                raise KeyboardInterrupt
            self._asked_to_stop = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _judge_by(self, sets: PairSets) -> None:
        """Forget the best gain so far if other pictures decided it, which says nothing about these."""
        judged: list[object] = [identity(sets), *self.config.validate_px]
        if self._judged not in ([], judged):
            self.best_gain = -math.inf
        self._judged = judged

    def _keep_best(self, quality: dict[str, SetQuality]) -> None:
        gain = sum(row.mean.gain_db for row in quality.values()) / len(quality) if quality else math.inf
        if gain >= self.best_gain:
            self.best_gain = gain
            save_checkpoint(self.averaged(), self.out / "best.safetensors", self._notes(quality))

    def _notes(self, quality: dict[str, SetQuality]) -> dict[str, str]:
        gains = {name: round(row.mean.gain_db, 4) for name, row in quality.items()}
        return {"step": str(self.step), "gain_db": msgspec.json.encode(gains).decode()}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": value for name, value in self.plain.state_dict().items()}
        tensors |= {f"heads.{name}": value for name, value in self.supervised.heads.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.tensors().items()}
        return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}

    def save_state(self) -> None:
        """Write everything that ``load_state`` needs, and the ``last`` checkpoint, each whole or not at all."""
        best = self.best_gain if math.isfinite(self.best_gain) else -1e9
        notes = {"step": self.step, "best_gain": best, "judged": self._judged}
        metadata = {
            "config": msgspec.json.encode(self.config).decode(),
            "notes": msgspec.json.encode(notes).decode(),
            "data": self.data_id,
        }
        save_tensors(self._tensors(), self.out / "state.safetensors", metadata)
        save_checkpoint(self.averaged(), self.out / "last.safetensors", self._notes({}))

    def load_state(self) -> None:
        """Go on where ``save_state`` left.

        Raises MissingFileError without a saved state, InputError if that run had other settings or data, ModelError if
        the file is damaged.
        """
        path = existing(self.out / "state.safetensors", kind="file")
        remove_leftovers(self.out / name for name in FILES)
        try:
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
            config = msgspec.json.decode(metadata["config"], type=TrainConfig)
            notes = msgspec.json.decode(metadata["notes"])
        except (SafetensorError, KeyError, TypeError, msgspec.MsgspecError) as error:
            raise ModelError(f"{path} is damaged ({error}); use --init {self.out}/best.safetensors instead") from None
        if not self.config.same_run(config):
            raise InputError(f"{path} belongs to a run with other settings; use the same ones or another --out")
        if self.data_id and metadata.get("data", "") not in ("", self.data_id):
            raise InputError(f"{path} belongs to a run on other data or other blur; use the same or another --out")
        try:
            self.plain.load_state_dict(_under("model.", tensors))
            self.supervised.heads.load_state_dict(_under("heads.", tensors))
            self.ema.load_state_dict(_under("ema.", tensors))
        except RuntimeError:
            raise InputError(f"{path} belongs to another network; use the same --preset or another --out") from None
        self.optimizer.load_tensors(_under("optimizer.", tensors))
        self.step, self.best_gain, self._judged = notes["step"], notes["best_gain"], notes.get("judged", [])


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Device placement, mixed precision and processes (as ``accelerate launch`` asks for, or just this one)."""
    cuda = torch.cuda.is_available()
    precision = "bf16" if uses_bf16(config.precision, cuda=cuda) else "no"
    return Accelerator(cpu=not cuda, mixed_precision=precision)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
