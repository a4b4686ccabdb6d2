"""PyTorch as a peer: the same network, uint8 in to uint8 out, in the ways that people run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from deblur_deploy.evaluation.worker import Candidate
from deblur_deploy.training.checkpoint import load_checkpoint

if TYPE_CHECKING:
    # Not at run time: the process's memory and start are PyTorch's, not OpenCV's.
    from deblur_deploy.media.images import Image


class Bytes(nn.Module):
    """The network from uint8 NHWC to uint8 NHWC, for heights and widths that it needs not pad."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = load_checkpoint(checkpoint).to(dtype)
        self.dtype = dtype

    def forward(self, image: Tensor) -> Tensor:
        """Restore a batch."""
        x = image.permute(0, 3, 1, 2).to(torch.float32) / 255
        restored = self.net.core(x.to(self.dtype)).to(torch.float32)
        return (restored * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def load(
    checkpoint: str,
    threads: int,
    *,
    device: str = "cpu",
    channels_last: bool = False,
    half: str = "",
    compiled: str = "",
) -> Candidate:
    """``half`` is bfloat16 for autocast or float16 for weights too, ``compiled`` the mode of torch.compile.

    float16 is what people use on GPUs, with weights that need no casting at each call; in bfloat16 the residual sum
    would lose bits of the image, which autocast keeps.  Copies to and from the device are part of the call, and the
    copy back waits for the result.
    """
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    torch.backends.cudnn.benchmark = True
    casts = half == "bfloat16"
    model: Any = Bytes(Path(checkpoint), torch.float16 if half == "float16" else torch.float32).eval().to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    if compiled:
        from torch._inductor import config as inductor

        inductor.freezing = True
        model = torch.compile(model, mode=compiled, dynamic=False)

    def restore(image: Image) -> Image:
        batch = torch.from_numpy(np.ascontiguousarray(image))[None].to(device)
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=casts):
            restored: Image = model(batch)[0].cpu().numpy()
        return restored

    facts = {
        "library": f"torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "channels_last": channels_last,
        "autocast": half if casts else None,
        "weights": half if half and not casts else "float32",
        # What torch does by default with fp32 convolutions on a GPU.
        "tf32": device == "cuda" and torch.backends.cudnn.allow_tf32 and not half,
        "torch.compile": compiled or None,
        "inductor freezing": bool(compiled),
    }
    return Candidate(restore=restore, facts=facts, threads=threads)


def export(checkpoint: Path, target: Path, height: int, width: int) -> Path:
    """ONNX by torch's own exporter, at one fixed size: the fastest that a user gets without more work."""
    model = Bytes(checkpoint).eval()
    example = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    torch.onnx.export(
        model, (example,), target, input_names=["image"], output_names=["restored"], dynamo=True, verbose=False
    )
    return target
