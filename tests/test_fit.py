"""The search for a latency lands where it should, with few measurements, and says when it cannot."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from deblur_deploy.errors import InputError
from deblur_deploy.pipeline.pruning.config import PruneConfig
from deblur_deploy.pipeline.pruning.fit import fit, time_exported
from deblur_deploy.pipeline.pruning.prune import Plan, network_of, plan_for
from deblur_deploy.training.unet import UNet, UNetConfig
from tests.photos import photo
from tests.small import unet


@pytest.fixture(scope="module")
def plan() -> Plan:
    torch.manual_seed(0)
    model = UNet(UNetConfig(stem=4, encoder=((64, 64), (96, 96)), up=(64,), decoder=((64, 64),)))
    return plan_for(model, PruneConfig(macs=0.5, importance="magnitude", multiple=2), [])


def clock(plan: Plan, power: float) -> tuple[list[float], object]:
    """A machine on which a share takes 10 + 90 share^power ms, and what it was asked."""
    asked: list[float] = []

    def measure(net: UNet) -> float:
        whole = plan.channels.model
        assert isinstance(whole, UNet)
        asked.append(net.config.macs_per_pixel / whole.config.macs_per_pixel)
        return 10 + 90 * asked[-1] ** power

    return asked, measure


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("target", [30.0, 50.0, 80.0])
def test_it_lands_within_a_tenth_below_the_target(plan: Plan, target: float, power: float) -> None:
    asked, measure = clock(plan, power)
    found = fit(plan, target, measure)  # type: ignore[arg-type]
    assert 0.9 * target <= found.ms <= target
    assert found.note == ""
    assert found.dense_ms == 100
    assert len(asked) == len(found.tried) <= 8
    assert network_of(plan, found.share).config.macs_per_pixel > 0


def test_what_is_fast_enough_already_stays(plan: Plan) -> None:
    _, measure = clock(plan, 1.0)
    found = fit(plan, 120, measure)  # type: ignore[arg-type]
    assert (found.share, found.ms) == (1.0, 100)
    assert "nothing is pruned" in found.note


def test_what_is_out_of_reach_is_said_with_the_best_there_is(plan: Plan) -> None:
    _, measure = clock(plan, 1.0)
    with pytest.raises(InputError, match=r"target_ms is 9, but the smallest network, .* takes 1\d\.\d ms"):
        fit(plan, 9, measure)  # type: ignore[arg-type]


def test_a_machine_of_steps_gives_the_best_and_says_what_lies_above(plan: Plan) -> None:
    found = fit(plan, 50, lambda net: 100.0 if net.config.macs_per_pixel > 2000 else 20.0)
    assert found.ms == 20
    assert "the next larger one that was measured takes 100.0 ms" in found.note
    shares = sorted(share for share, _ in found.tried)
    assert all(a < b for a, b in pairwise(shares))


def test_a_network_that_cannot_shrink_is_measured_once() -> None:
    model = UNet(UNetConfig(stem=4, encoder=((1,), (1,)), up=(1,), decoder=((1,),)))
    whole = plan_for(model, PruneConfig(macs=0.5, importance="magnitude"), [])
    asked, measure = clock(whole, 1.0)
    with pytest.raises(InputError, match=r"takes 100\.0 ms; that is the best"):
        fit(whole, 50, measure)  # type: ignore[arg-type]
    assert asked == [1.0]


@pytest.mark.slow
def test_exported_networks_are_timed_in_turn() -> None:
    config = PruneConfig(at="64x48")
    timings = time_exported([unet("flat"), unet("flat")], config, [photo(0)])
    assert [timing.calls for timing in timings] == [10, 10]
    assert all(timing.median_ms > 0 for timing in timings)
