"""Engines that were made before a fork, as gunicorn --preload and multiprocessing do; in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

PRELUDE = """
import os, signal, sys, threading, time, warnings
import numpy as np
from deblur_deploy import DeblurEngine
from deblur_deploy.errors import InputError, ProviderError
bundle = sys.argv[1]
image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)

def child(work, leaving=0):
    # Leaves as an app does, with all destructors; an alarm ends it if it hangs.
    sys.stdout.flush()
    if pid := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == leaving, f"the child ended with {status}"
        return
    signal.alarm(20)
    work()
    sys.exit(leaving)
"""

CASES = {
    "the same results, after calls with fixed shapes": """
engine = DeblurEngine(bundle, "cpu")
expected = [engine(image) for _ in range(3)][0]
deep = engine(image / 255)
def work():
    for _ in range(4):
        np.testing.assert_array_equal(engine(image), expected)
    np.testing.assert_array_equal(engine(image / 255), deep)
child(work)
np.testing.assert_array_equal(engine(image), expected)
child(work)
""",
    "a child that does not call it": """
engine = DeblurEngine(bundle, "cpu")
engine(image)
child(lambda: None, leaving=7)
closed = DeblurEngine(bundle, "cpu")
def work():
    closed.close()
    try:
        closed(image)
    except InputError as error:
        assert "closed" in str(error)
child(work)
""",
    "children of children": """
engine = DeblurEngine(bundle, "cpu")
expected = engine(image)
def work():
    np.testing.assert_array_equal(engine(image), expected)
child(lambda: (child(work), work(), child(work)))
""",
    "while other threads compute, and make engines": """
engine, go = DeblurEngine(bundle, "cpu"), True
expected = engine(image)
def busy():
    while go:
        engine(np.zeros((300, 300, 3), np.uint8))
def making():
    while go:
        DeblurEngine(bundle, "cpu")(image)
threads = [threading.Thread(target=one) for one in (busy, busy, making)]
for thread in threads:
    thread.start()
def work():
    np.testing.assert_array_equal(engine(image), expected)
    np.testing.assert_array_equal(DeblurEngine(bundle, "cpu")(image), expected)
for _ in range(5):
    time.sleep(0.03)
    child(work)
go = False
for thread in threads:
    thread.join()
""",
    "many threads of the child call it first": """
engine = DeblurEngine(bundle, "cpu")
expected = engine(image)
def work():
    found = []
    threads = [threading.Thread(target=lambda: found.append(engine(image))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all((one == expected).all() for one in found)
child(work)
""",
    "the receipt is the child's": """
if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
    sys.exit(0)
engine = DeblurEngine(bundle, "cpu")
assert engine.receipt.threads == len(os.sched_getaffinity(0))
def work():
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
    engine(image)
    assert engine.receipt.threads == 1, engine.receipt
    assert len(os.listdir("/proc/self/task")) == 1
child(work)
def work():
    before = len(os.listdir("/proc/self/task"))
    assert before == 1
    engine(image)
    assert engine.receipt.threads == len(os.listdir("/proc/self/task")), "its threads are there"
child(work)
""",
    "a stream that was begun before": """
engine = DeblurEngine(bundle, "cpu")
stream = engine.map(image for _ in range(100))
next(stream)
def work():
    try:
        for _ in stream:
            pass
    except InputError as error:
        assert "before a fork" in str(error)
        return
    raise AssertionError("it went on")
child(work)
stream.close()
""",
    "multiprocessing": """
import multiprocessing
engine = DeblurEngine(bundle, "cpu")
expected = engine(image)
def inherited(image):
    return engine(image)
pool = multiprocessing.get_context("fork").Pool(2)
for found in [*pool.map(inherited, [image] * 6), *pool.map(engine, [image] * 2)]:
    np.testing.assert_array_equal(found, expected)
pool.close()
pool.join()
""",
    "a provider that does not survive": """
from dataclasses import replace
named, auto = DeblurEngine(bundle, "cpu"), DeblurEngine(bundle)
for engine in (named, auto):
    engine._main.provider = replace(engine._main.provider, name="openvino")
def work():
    for _ in range(2):
        try:
            named(image)
        except ProviderError as error:
            assert "spawn" in str(error) and "openvino" in str(error), error
        else:
            raise AssertionError("it computed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        auto(image)
        auto(image)
    assert [str(one.message).partition(":")[0] for one in caught] == ["provider openvino is not used"]
    assert caught[0].filename == "<string>"
    assert auto.receipt.provider == "cpu"
    assert "spawn" in auto.receipt.skipped["openvino"]
child(work)
""",
}


@pytest.mark.parametrize("case", CASES)
def test_an_engine_and_a_fork(bundle: Path, case: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PRELUDE + CASES[case], str(bundle)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
