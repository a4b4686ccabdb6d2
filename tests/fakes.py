"""Candidates that stand in for engines and peers; their own module, so that a worker's process imports nothing else."""

from __future__ import annotations

import os
import sys
import time

import numpy as np

from deblur_deploy.evaluation.worker import Candidate


def identity(milliseconds: float = 0) -> Candidate:
    sys.stdout.write("a library that talks on standard output\n")

    def restore(image):
        time.sleep(milliseconds / 1e3)
        return image

    return Candidate(restore=restore, facts={"variable": os.environ.get("FAKE")})


def darker() -> Candidate:
    return Candidate(restore=lambda image: np.maximum(image, 1) - 1, facts={})


def absent() -> Candidate:
    raise RuntimeError("no such\n  library")


def crashing(after: int) -> Candidate:
    def restore(image):
        nonlocal after
        after -= 1
        if after < 0:
            sys.stderr.write("segmentation fault, core dumped\n")
            sys.stderr.flush()
            os._exit(139)
        return image

    return Candidate(restore=restore, facts={})


def hungry(megabytes: int) -> Candidate:
    def restore(image):
        np.ones((megabytes, 2**20), np.uint8)
        return image

    return Candidate(restore=restore, facts={})


def coarse(receipt: dict[str, str]) -> Candidate:
    return Candidate(restore=lambda image: np.maximum(image, 1) - 1, facts={"receipt": receipt})
