"""The two roads of pruning: our U-Nets in stages that resume and are cached, a module of somebody else's at once."""

from __future__ import annotations

from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.pipeline.config import NetworkConfig
from deblur_deploy.pipeline.doors.source import Source, of_checkpoint
from deblur_deploy.pipeline.inputs import Photos
from deblur_deploy.pipeline.pruning.config import PruneConfig
from deblur_deploy.pipeline.pruning.shrink import PRUNED, Shrinking, Smaller
from deblur_deploy.pipeline.stages import Record, Stages


def pruned(source: Source, config: PruneConfig, wish: NetworkConfig, stages: Stages, pairs: Photos[Pair]) -> Smaller:
    """``source``, pruned if ``config`` asks for it; raises InputError if it has no layers that could be."""
    if not config:
        return Smaller(source=source, record=Record())
    if source.runner is None:
        assert source.path is not None
        shrinking = Shrinking(stages=stages, checkpoint=source.path, parent=source.parent, config=config, pairs=pairs)
        path, record = shrinking.run()
        small = of_checkpoint(path)
        return Smaller(source=small, record={**record, "checkpoint": PRUNED, "sha256": small.parent}, file=path)
    if source.module is None:
        raise InputError(f"{source.path} cannot be pruned: an ONNX file has no layers left to retrain; give its module")
    from deblur_deploy.pipeline.pruning.module import prune_module

    return prune_module(source, config, wish, pairs, stages.work, stages.on_progress)
