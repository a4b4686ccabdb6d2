"""What torch raises from the depth of a training step, as one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from deblur_deploy.errors import DeblurError, TrainingError


@contextmanager
def told(shape: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """Around training on batches of ``shape()`` (patches, side in pixels).

    Raises TrainingError if memory does not suffice, or if a loader process was killed: torch raises that wherever the
    trainer happens to be.
    """
    try:
        yield
    except DeblurError:
        raise
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            patches, side = shape()
            why = f"out of memory with {patches} patches of {side} px; take fewer or smaller ones"
        elif text.startswith("DataLoader worker"):
            why = "a loader process was killed (out of memory?); what was saved can be resumed"
        else:
            raise
        raise TrainingError(why) from None
