"""What pruning gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deblur_deploy.pipeline.doors.source import Source
from deblur_deploy.pipeline.stages import Record


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """A network after pruning, or as it was."""

    source: Source
    record: Record
    """What there is to say about pruning."""
    file: Path | None = None
    """The pruned network, for the bundle."""
