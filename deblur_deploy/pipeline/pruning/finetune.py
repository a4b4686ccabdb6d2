"""Recovery of somebody else's pruned network: it learns from the truth and from what the whole network makes of it.

A shorter ``recover``: any ``nn.Module`` has an output that can be compared, but no features known by name, and no
checkpoint of ours to resume from.  Both networks stay in eval mode, so that statistics of normalisation layers, which
the few patches of a batch would spoil, are kept.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from deblur_deploy.errors import TrainingError, one_line
from deblur_deploy.pipeline.pruning.config import RecoverConfig
from deblur_deploy.pipeline.pruning.recover import batches_for
from deblur_deploy.training.config import uses_bf16
from deblur_deploy.training.failures import told
from deblur_deploy.training.losses import parse_loss
from deblur_deploy.training.optimizer import Optimizer, averaging
from deblur_deploy.training.unet import pad_to_multiple
from deblur_deploy.training.winograd import Winograd

_NO_END = 1 << 40


def finetune(
    student: nn.Module,
    teacher: nn.Module,
    config: RecoverConfig,
    divisor: int,
    folder: Path,
    watch: Callable[[int, float], None] = lambda *_: None,
) -> nn.Module:
    """A fine-tuned copy of ``student``, by the averaged weights, on the CPU and in eval mode.

    ``watch`` hears of every step and its loss; videos are unpacked into ``folder``.  Raises TrainingError, nothing
    being changed, if the loss is not finite, the network fails on a batch, or memory does not suffice.
    """
    # Where time is given, the number of steps only scales the learning rate's curve.
    training = config.training(config.steps or RecoverConfig().steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss = parse_loss(training.loss).to(device)
    model, whole = (copy.deepcopy(net).to(device).eval() for net in (student, teacher))
    whole.requires_grad_(requires_grad=False)
    model.requires_grad_()
    averaged = AveragedModel(model, multi_avg_fn=averaging(training.ema))
    rate, decay = training.learning_rate, training.weight_decay
    optimizer = Optimizer(training.optimizer, model.parameters(), rate=rate, weight_decay=decay)
    batches = batches_for(config, training, folder)
    batches.blur_here = device.type != "cuda"
    bf16 = uses_bf16(config.precision, cuda=device.type == "cuda")
    restored = partial(_restored, divisor=divisor, bf16=bf16, precision=config.precision)
    start, done = time.monotonic(), 0.0
    last = config.steps if config.minutes is None else _NO_END
    with told(lambda: (config.patches, config.side_px)):
        for step, batch in enumerate(batches.load(0, last, config.workers)):
            batch = batch.finished(batches.blur, device)
            blurred, sharp = batch.blurred.float() / 255, batch.sharp.float() / 255
            with torch.enable_grad(), Winograd():
                image = restored(model, blurred)
                with torch.no_grad():
                    wanted = restored(whole, blurred)
                error = loss(image, sharp) + config.teacher * loss(image, wanted)
                error.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
            if not math.isfinite(error.item()) or not math.isfinite(norm.item()):
                raise TrainingError(f"loss is {error.item()} at step {step}; lower --prune.recover.learning-rate")
            optimizer.step(training.rate(int(done * training.steps)))
            optimizer.zero_grad()
            averaged.update_parameters(model)
            watch(step + 1, error.item())
            done = (step + 1) / last if config.minutes is None else (time.monotonic() - start) / (60 * config.minutes)
            if done >= 1:
                break
    result: nn.Module = averaged.module.cpu().requires_grad_(requires_grad=False).eval()
    return result


def _restored(net: nn.Module, images: Tensor, *, divisor: int, bf16: bool, precision: str) -> Tensor:
    height, width = images.shape[-2:]
    try:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            result: Tensor = net(pad_to_multiple(images, divisor))
    except RuntimeError as error:  # it is somebody else's network
        raise TrainingError(
            f"recovery: the network fails on {width}x{height} patches in {precision}: {one_line(error)}; "
            "choose another --prune.recover.side-px or --prune.recover.precision"
        ) from None
    return result[..., :height, :width].float()
