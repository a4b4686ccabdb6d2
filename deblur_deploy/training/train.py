"""Training: Adam, warm-up and cosine, averaged weights, patches that grow, and a state that resumes exactly."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deblur_deploy.errors import InputError, TrainingError
from deblur_deploy.evaluation.quality import Image, Pair, Quality, mean_quality, measure
from deblur_deploy.files import writing_file
from deblur_deploy.training.batches import Batches
from deblur_deploy.training.checkpoint import save_checkpoint
from deblur_deploy.training.losses import parse_loss
from deblur_deploy.training.unet import UNet


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One step of progressive training."""

    share: float
    """Share of all steps."""
    patches: int
    """Patches in a batch."""
    side_px: int
    """Height and width of a patch."""

    def __post_init__(self) -> None:
        for name, value in (("share", self.share), ("patches", self.patches), ("side_px", self.side_px)):
            if value <= 0:
                raise ValueError(f"{name} is {value}; allowed: more than 0")


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train, apart from network and data."""

    steps: int = 8000
    """Optimizer steps."""
    stages: tuple[Stage, ...] = (
        Stage(share=0.35, patches=32, side_px=128),
        Stage(share=0.35, patches=16, side_px=192),
        Stage(share=0.30, patches=16, side_px=256),
    )
    """Patch sizes, from low to high."""
    loss: str = "l1=1"
    """Weighted sum of mse, l1, charbonnier, ssim, fft, perceptual."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """Adam, or Adam with decoupled weight decay."""
    learning_rate: float = 1e-3
    """Highest learning rate."""
    weight_decay: float = 1e-4
    """Decoupled weight decay (AdamW only)."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises; it then falls along a cosine to 1 % of its height."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones that are validated and saved."""
    seed: int = 0
    """Seed of data order, blur and initial weights."""
    workers: int = 1
    """Processes that make batches ahead."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of forward and backward passes."""
    validate_every: int = 1000
    """Steps between validations (and log lines)."""
    save_every_s: float = 60
    """Seconds between saved states."""

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "clip_norm", "validate_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: more than 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; allowed: 0 or more, below 1")
        if not self.stages:
            raise ValueError("stages is empty; allowed: one or more")

    def schedule(self) -> list[tuple[int, int, int]]:
        """(first step, patches, side in pixels) of each stage."""
        shares = np.cumsum([0.0, *(stage.share for stage in self.stages)])
        firsts = np.rint(shares / shares[-1] * self.steps).astype(int)
        return [(int(first), s.patches, s.side_px) for first, s in zip(firsts, self.stages, strict=False)]

    def rate(self, step: int) -> float:
        """Learning rate at ``step``."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        progress = min(1.0, max(0, step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1))
        return self.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class TorchRestorer:
    """A network as a ``Restorer``: the plain float reference that everything else is compared with."""

    model: UNet

    @torch.inference_mode()
    def __call__(self, image: Image) -> Image:
        device = next(self.model.parameters()).device
        batch = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float() / 255
        restored = (self.model(batch).clamp(0, 1) * 255).round()
        return restored[0].permute(1, 2, 0).to(torch.uint8).cpu().numpy()


def validate(model: UNet, sets: dict[str, list[Pair]]) -> dict[str, Quality]:
    """Mean quality of ``model`` on each named set of pairs."""
    restorer = TorchRestorer(model)
    return {name: mean_quality(measure(restorer, pair) for pair in pairs) for name, pairs in sets.items()}


class Trainer:
    """One run in one folder: ``state.safetensors`` (to resume), ``last`` and ``best`` checkpoints, ``log.csv``."""

    def __init__(self, model: UNet, config: TrainConfig, out: Path, accelerator: Accelerator | None = None) -> None:
        self.config, self.out = config, out
        self.accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        self.device = self.accelerator.device
        self.plain = model.to(self.device, memory_format=torch.channels_last)
        self.ema = AveragedModel(self.plain, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        decay = config.weight_decay if config.optimizer == "adamw" else 0.0
        self.optimizer = kind(self.plain.parameters(), lr=config.learning_rate, weight_decay=decay)
        self.model = self.accelerator.prepare_model(self.plain)
        self.loss = parse_loss(config.loss)
        self.step = 0
        self.best_gain = -math.inf

    def run(self, batches: Batches, sets: dict[str, list[Pair]], on_step: object = None) -> dict[str, Quality]:
        """Train to the last step; returns the last validation."""
        config, quality = self.config, {}
        loader = batches.load(self.step, config.steps, config.workers)
        saved, recent = time.monotonic(), []
        started, first = time.monotonic(), self.step
        while self.step < config.steps:
            recent.append(self._train_step(next(loader)))
            if callable(on_step):
                on_step(self.step, recent[-1])
            if self.step % config.validate_every == 0 or self.step == config.steps:
                quality = validate(self.averaged(), sets)
                pace = (time.monotonic() - started) / (self.step - first)
                self._log(float(np.mean(recent)), pace, quality)
                gain = float(np.mean([row.gain_db for row in quality.values()])) if quality else self.step
                if gain >= self.best_gain:
                    self.best_gain = gain
                    save_checkpoint(self.averaged(), self.out / "best.safetensors", {"step": str(self.step)})
                recent = []
            if time.monotonic() - saved > config.save_every_s or self.step == config.steps:
                self.save_state()
                saved = time.monotonic()
        save_checkpoint(self.averaged(), self.out / "last.safetensors", {"step": str(self.step)})
        return quality

    def averaged(self) -> UNet:
        """The averaged weights."""
        return self.ema.module if self.step else self.plain

    def _train_step(self, batch: tuple[Tensor, Tensor]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        blurred, sharp = (
            images.to(self.device, non_blocking=True).float().div(255).contiguous(memory_format=torch.channels_last)
            for images in batch
        )
        self.plain.train()
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
            restored = self.model(blurred)
        loss = self.loss(restored.float(), sharp)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.plain.parameters(), self.config.clip_norm)
        if not torch.isfinite(loss) or not torch.isfinite(norm):
            raise TrainingError(f"loss is {loss.item()} at step {self.step}; lower --learning-rate and --resume")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update_parameters(self.plain)
        self.step += 1
        return loss.item()

    def _log(self, loss: float, seconds_per_step: float, quality: dict[str, Quality]) -> None:
        row: dict[str, object] = {"step": self.step, "loss": f"{loss:.5f}", "s_per_step": f"{seconds_per_step:.3f}"}
        for name, result in quality.items():
            row |= {f"{name}_{key}": f"{value:.4f}" for key, value in asdict(result).items()}
            row[f"{name}_gain_db"] = f"{result.gain_db:.3f}"
        path = self.out / "log.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": value for name, value in self.plain.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}

    def save_state(self) -> None:
        """Write everything that ``load_state`` needs, whole or not at all."""
        notes = {"step": self.step, "best_gain": self.best_gain if math.isfinite(self.best_gain) else -1e9}
        metadata = {"config": msgspec.json.encode(self.config).decode(), "notes": msgspec.json.encode(notes).decode()}
        with writing_file(self.out / "state.safetensors") as temporary:
            save_file(self._tensors(), temporary, metadata)

    def load_state(self) -> None:
        """Go on where ``save_state`` left; raises InputError if that run had another config."""
        path = self.out / "state.safetensors"
        with safe_open(path, framework="pt", device=str(self.device)) as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if msgspec.json.decode(metadata["config"], type=TrainConfig) != self.config:
            raise InputError(f"{path} belongs to a run with other settings; use the same ones or another --out")
        notes = msgspec.json.decode(metadata["notes"])
        self.step, self.best_gain = notes["step"], notes["best_gain"]
        self.plain.load_state_dict(_under("model.", tensors))
        self.ema.load_state_dict(_under("ema.", tensors))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("optimizer.", tensors).items():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_sets(folders: Iterable[Path], read: object) -> dict[str, list[Pair]]:
    """Validation pairs by folder name."""
    return {folder.name: list(read(folder)) for folder in folders}  # type: ignore[operator]
