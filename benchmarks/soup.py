"""Which mean of several trainings' weights restores best?  A mean costs nothing to run, and often beats all of them.

    python -m benchmarks.soup first.safetensors second.safetensors --val PAIRS... --out mean.safetensors

Networks that were trained from the same beginning, in different orders or at different rates, can be averaged weight by
weight (Wortsman et al., Model soups, 2022).  Shares are found as in ensemble selection (Caruana et al., 2004): the best
network alone, then again and again the one, taken already or not, whose addition raises the gain most, until none does.
Shares chosen on pairs flatter these pairs a little: look at others too.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tyro
from torch import Tensor

from deblur_deploy.cli.common import OK, guarded
from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.quality import PairSet
from deblur_deploy.evaluation.sets import by_name
from deblur_deploy.files import refuse_unwritable
from deblur_deploy.training.checkpoint import load_checkpoint, save_checkpoint
from deblur_deploy.training.validation import validate

Shares = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Average checkpoints of one shape."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """What deblur-train wrote, two or more."""
    val: tuple[Path, ...]
    """Folders or CSV files of pairs; each set counts alike."""
    out: Path
    """Write the best mean here."""
    validate_px: tuple[int, int] = (768, 512)
    """Width and height of the middle of each pair that is looked at; 0 is all."""
    most: int = 8
    """Networks in a mean at most, counted as often as they are taken."""


def select(names: Sequence[str], gain: Callable[[Shares], float], most: int) -> tuple[dict[str, float], float]:
    """The shares that were found best, by name, and their ``gain``, which is asked once for each mean."""
    seen: dict[tuple[tuple[str, float], ...], float] = {}

    def asked(taken: Counter[str]) -> float:
        shares = {name: taken[name] / taken.total() for name in names if taken[name]}
        key = tuple(shares.items())
        if key not in seen:
            seen[key] = gain(shares)
        return seen[key]

    best = Counter([max(names, key=lambda name: asked(Counter([name])))])
    while best.total() < most:
        more = max((best + Counter([name]) for name in names), key=asked)
        if asked(more) <= asked(best):
            # Of two, a third of the other may be too much where a quarter is not.
            finer = [best + best + Counter([name]) for name in names] if 2 * best.total() < most else []
            more = max(finer, key=asked, default=best)
            if asked(more) <= asked(best):
                break
        best = more
    return {name: best[name] / best.total() for name in names if best[name]}, asked(best)


def mixed(states: Mapping[str, Mapping[str, Tensor]], shares: Shares) -> dict[str, Tensor]:
    """The weighted mean of weights."""
    first = next(iter(states.values()))
    return {key: sum((share * states[name][key] for name, share in shares.items()), 0 * first[key]) for key in first}


def average(arguments: Arguments) -> None:
    """Find the best mean, write it and print its shares as JSON."""
    refuse_unwritable(arguments.out)
    nets = {str(path): load_checkpoint(path) for path in arguments.checkpoints}
    if len(nets) < 2 or len({str(net.config) for net in nets.values()}) > 1:
        raise InputError("give two or more checkpoints of one shape")
    states = {name: net.state_dict() for name, net in nets.items()}
    sets = {name: PairSet(path) for name, path in by_name(arguments.val).items()}
    network = load_checkpoint(arguments.checkpoints[0]).eval()

    def gain(shares: Shares) -> float:
        network.load_state_dict(mixed(states, shares))
        found = validate(network, sets, arguments.validate_px)
        gains = ", ".join(f"{name} {row.mean.gain_db:+.3f}" for name, row in found.items())
        print(", ".join(f"{share:.3f} {name}" for name, share in shares.items()), "-", gains, file=sys.stderr)
        return fmean(row.mean.gain_db for row in found.values())

    shares, best = select(list(nets), gain, arguments.most)
    network.load_state_dict(mixed(states, shares))
    save_checkpoint(network, arguments.out, {"mean_of": json.dumps(shares)})
    print(json.dumps({"shares": shares, "mean_gain_db": round(best, 4), "written": str(arguments.out)}))


def command(argv: Sequence[str] | None = None) -> int:
    """Average."""
    average(tyro.cli(Arguments, args=argv))
    return OK


main = guarded("soup.py", command)

if __name__ == "__main__":
    sys.exit(main())
