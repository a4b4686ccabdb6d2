"""What an engine no longer needs goes back to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deblur_deploy import DeblurEngine
from deblur_deploy.runtime import sessions
from deblur_deploy.system import memory
from tests.conftest import noise

HOLES = """
import numpy as np
from deblur_deploy.system.memory import give_back, resident_bytes
whole, between = [], []
for _ in range(1000):
    whole.append(np.ones(12_000))
    between.append(np.ones(20))
full = resident_bytes()
del whole
kept = resident_bytes()
give_back()
print((full - kept) >> 20, (kept - resident_bytes()) >> 20)
"""


@pytest.mark.skipif(memory._trim() is None, reason="not glibc, which alone keeps that much")
def test_what_is_free_between_what_is_in_use_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, timeout=60)
    kept, given = map(int, done.stdout.split())
    assert kept < 10
    assert given > 70


def test_a_library_without_that_call_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_trim", lambda: None)
    memory.give_back()


def test_a_session_that_makes_room_or_is_closed_gives_back(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(sessions, "give_back", lambda: given.append("room"))
    monkeypatch.setattr("deblur_deploy.runtime.engine.give_back", lambda: given.append("closed"))
    with DeblurEngine(bundle, "cpu") as engine:
        for side in range(20, 20 + 4 * (sessions.MAX_FIXED + 1), 4):
            for image in [noise(side, side, 3)] * sessions._OFTEN_WHEN_FULL:
                assert engine(image).shape == image.shape
        assert given == ["room"]
    assert given == ["room", "closed"]
