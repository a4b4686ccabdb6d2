from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deblur_deploy.evaluation import clock
from deblur_deploy.evaluation.clock import Lap, own_clock, thread_times
from deblur_deploy.evaluation.latency import Timing, at_size, median_noise, take_turns


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=60))
def test_noise_is_within_the_range_of_the_times_and_knows_no_unit(times):
    noise = median_noise(times)
    assert 0 <= noise <= (max(times) - min(times)) / 2 / np.median(times) * (1 + 1e-9)
    assert median_noise([1000 * value for value in times]) == pytest.approx(noise)


def test_the_interval_behind_the_noise_holds_the_median_19_times_in_20():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        times = sorted(rng.exponential(size=15))
        # For 15 values the 95 % interval goes from the 4th to the 12th (Conover's table A3 gives 96.5 %).
        assert median_noise(times) >= (times[11] - times[3]) / 2 / times[7] - 1e-12
        inside += times[3] <= np.log(2) <= times[11]
    assert inside >= 0.95 * 400


def test_every_round_times_everyone_once_in_changing_order():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abcd"}
    timings = take_turns(calls, rounds=8, warm_up=1)
    assert order[:4] == list("abcd")
    rounds = [tuple(order[at : at + 4]) for at in range(4, len(order), 4)]
    assert all(sorted(turn) == list("abcd") for turn in rounds)
    assert len(set(rounds)) > 1
    assert {timing.calls for timing in timings.values()} == {8} == {len(rounds)}


def test_who_has_failed_does_not_keep_the_others_from_ending():
    laps = {"good": Lap(5.0), "failed": Lap(math.nan)}
    calls = {name: partial(str, name) for name in laps}
    timings = take_turns(calls, rounds=50, warm_up=0, stable=0.02, clock=lambda call: laps[call()])
    assert timings["good"].calls == 3


@pytest.mark.parametrize(
    ("times", "stable", "budget_s", "calls"),
    [
        ([5.0] * 50, 0.02, 60, 3),  # quiet: three are enough
        ([5.0, 9.0] * 25, 0.02, 60, 50),  # restless: all that may be
        ([5.0, 9.0] * 25, 1.0, 60, 3),  # restless, but told to bear it
        ([5.0, 9.0] * 25, 0.02, 0, 3),  # no time left: three nevertheless
    ],
)
def test_it_measures_until_the_medians_are_stable_or_time_is_up(times, stable, budget_s, calls):
    laps = [Lap(ms) for ms in times]
    given, rounds = iter(laps), []
    timing = take_turns(
        {"a": lambda: None}, rounds=50, warm_up=0, stable=stable, budget_s=budget_s, clock=lambda _: next(given),
        on_round=rounds.append,
    )["a"]  # fmt: skip
    assert timing.calls == calls
    assert timing == Timing.of(laps[:calls])
    assert rounds == list(range(1, calls + 1))


def test_steady_is_what_is_left_without_waiting_and_all_of_it_where_that_is_unknown():
    laps = [Lap(10.0, 0.0), Lap(30.0, 20.0), Lap(50.0, 39.0)]
    timing = Timing.of(laps)
    assert (timing.median_ms, timing.steady_ms) == (30.0, 10.0)
    assert timing.waited == pytest.approx((0 + 20 / 30 + 39 / 50) / 3)
    assert timing.steady_noise < 0.06 < timing.noise
    unknown = Timing.of([Lap(lap.ms) for lap in laps])
    assert (unknown.steady_ms, unknown.waited) == (30.0, None)


def test_a_thread_that_ends_while_it_is_asked_is_left_out(monkeypatch):
    whole = thread_times()
    if whole is None:
        pytest.skip("this system does not count waiting")
    gone = iter([FileNotFoundError, ProcessLookupError])

    def vanishing(path, mode):
        if error := next(gone, None):
            raise error(path)
        return open(path, mode)

    monkeypatch.setattr(clock, "open", vanishing, raising=False)
    with ThreadPoolExecutor(3) as pool:
        wait = threading.Barrier(4)
        for _ in range(3):
            pool.submit(wait.wait)
        assert thread_times()
        wait.wait()


def test_waiting_behind_others_is_counted_and_subtracted():
    """Four processes want one core; the truth is this thread's wall clock less its own processor time."""
    if thread_times() is None:
        pytest.skip("this system does not count waiting")
    core = min(os.sched_getaffinity(0))
    code = "import time; end = time.monotonic() + 10; print(flush=True)\nwhile time.monotonic() < end: pass"
    rivals = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(3)]
    truth: dict[str, float] = {}

    def work() -> None:
        start, ran = time.perf_counter(), time.thread_time()
        while time.thread_time() - ran < 0.05:
            pass
        truth["wall"] = 1e3 * (time.perf_counter() - start)
        truth["ran"] = 1e3 * (time.thread_time() - ran)

    allowed = os.sched_getaffinity(0)
    try:
        for rival in rivals:
            assert rival.stdout.readline()
        for rival in rivals:
            os.sched_setaffinity(rival.pid, [core])
        os.sched_setaffinity(0, [core])
        # Some schedulers leave a newcomer alone for long, so it may take a few turns until there is something to count.
        for _ in range(20):
            lap = own_clock(work, threads=1)
            if truth["wall"] - truth["ran"] > 50:
                break
        else:
            pytest.skip("this system's scheduler lets nobody wait")
    finally:
        os.sched_setaffinity(0, allowed)
        for rival in rivals:
            rival.kill()
            rival.communicate()
    assert lap.waited_ms == pytest.approx(truth["wall"] - truth["ran"], rel=0.25)
    assert lap.steady_ms == pytest.approx(truth["ran"], rel=0.25)


def test_threads_that_wait_for_each_other_wait_for_nobody_else():
    """More threads than cores take each other's turns, which is their own slowness."""
    if thread_times() is None:
        pytest.skip("this system does not count waiting")
    allowed, data = os.sched_getaffinity(0), bytes(20_000_000)
    try:
        os.sched_setaffinity(0, [min(allowed)])
        with ThreadPoolExecutor(5) as pool:

            def crowd() -> None:
                list(pool.map(lambda _: sha256(data), range(5)))  # hashing lets go of the interpreter's lock

            crowd()
            start = time.process_time()
            lap = own_clock(crowd)
            needed_ms = 1e3 * (time.process_time() - start)
    finally:
        os.sched_setaffinity(0, allowed)
    assert lap.steady_ms > 0.9 * needed_ms


def test_warm_up_is_not_timed():
    seen: Counter[str] = Counter()
    timing = take_turns({"a": lambda: seen.update("a")}, rounds=4, warm_up=3)["a"]
    assert seen["a"] == 7
    assert timing.calls == 4


@settings(max_examples=30, deadline=None)
@given(*(st.integers(1, 90) for _ in range(4)))
def test_a_photo_takes_exactly_the_size_that_is_timed_and_stays_a_photo(height, width, wanted_height, wanted_width):
    photo = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    scaled = at_size(photo, wanted_width, wanted_height)
    assert scaled.shape == (wanted_height, wanted_width, 3)
    assert scaled.dtype == np.uint8
    assert scaled.flags.c_contiguous
    if (height, width) == (wanted_height, wanted_width):
        assert np.array_equal(scaled, photo)
