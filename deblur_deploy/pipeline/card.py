"""The head of a model card, by which model hubs file it: YAML between two lines of dashes."""

from __future__ import annotations

from collections.abc import Sequence

from deblur_deploy.files import sha256
from deblur_deploy.shipped import DEFAULT_CHECKPOINT


def front_matter(checkpoint_sha256: str, variants: Sequence[str]) -> str:
    """Licence, tags and metrics of a bundle made from that checkpoint; of others' weights we know no licence."""
    ours = DEFAULT_CHECKPOINT.is_file() and sha256(DEFAULT_CHECKPOINT) == checkpoint_sha256
    precisions = [name for name in ("fp16", "int8") if name in variants]
    tags = "\n".join(f"- {tag}" for tag in ("deblurring", "image-restoration", "onnx", "onnxruntime", *precisions))
    return f"""---
license: {"mit" if ours else "unknown"}
library_name: onnx
pipeline_tag: image-to-image
tags:
{tags}
metrics:
- psnr
- ssim
---
"""
