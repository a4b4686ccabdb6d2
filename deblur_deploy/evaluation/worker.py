"""Runs one candidate in a process of its own, for ``bench`` to time: both ends of the pipe between them.

There its memory is its own, its libraries' threads are the only ones, a crash ends nobody else, and its load and first
image are as cold as an app's.  The process waits while others compute, so candidates can still take turns.

The two ends exchange pickles over standard input and output; the child's own prints go to standard error.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from deblur_deploy.errors import DeblurError, ProviderError
from deblur_deploy.evaluation.clock import Lap, own_clock

if TYPE_CHECKING:
    # Not at run time: the child's memory and start are the candidate's, not scikit-image's.
    from deblur_deploy.evaluation.quality import Restorer
    from deblur_deploy.media.images import Image

PATIENCE_S = 600.0
"""How long a candidate may take for one answer before it counts as hanging; some compile for minutes."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a factory returns: something that restores images, and what is known about it."""

    restore: Restorer
    facts: dict[str, Any]
    """JSON-able: the receipt, or the settings that were chosen."""
    threads: int | None = None
    """How many threads share the work of one image; by default as many as there are cores."""


class Worker:
    """A candidate that was made by ``factory`` ("module:function") with ``arguments``, in a child process.

    Raises ProviderError with the child's own message if the candidate cannot be made; use it as a context manager.
    """

    def __init__(self, factory: str, arguments: Mapping[str, Any], *, environment: Mapping[str, str] | None = None):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                # Without -P it would import what lies in the working folder, as a random.py of the user's.
                [sys.executable, "-P", "-m", "deblur_deploy.evaluation.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})},
            )
        except OSError as error:
            self._log.close()
            raise ProviderError(f"its process does not start: {error.strerror}") from None
        try:
            answer = self._ask("load", factory, dict(arguments))
        except BaseException:
            self.close()
            raise
        self.load_ms: float = answer["ms"]

    @property
    def facts(self) -> dict[str, Any]:
        """What is known about the candidate by now: some tell only after the first image what they chose."""
        facts: dict[str, Any] = self._ask("facts")["facts"]
        return facts

    def restore(self, image: Image) -> Image:
        """Restore an image."""
        restored: Image = self._ask("restore", image)["image"]
        return restored

    def keep(self, image: Image) -> None:
        """Send the image that ``run`` works on."""
        self._ask("keep", image)

    def run(self) -> Lap:
        """Restore the kept image and forget the result; answers the time of that, taken in the child."""
        lap: Lap = self._ask("run")["lap"]
        return lap

    def peak_mb(self) -> float | None:
        """The most memory that the child has had so far, Python and libraries included, in MB; None if unknown."""
        peak: float | None = self._ask("peak")["mb"]
        return peak

    def close(self) -> None:
        """End the child."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, *message: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        hangs = threading.Event()

        def give_up() -> None:
            hangs.set()
            self._process.kill()

        watchdog = threading.Timer(PATIENCE_S, give_up)
        watchdog.start()
        try:
            _send(self._process.stdin, message)
            answer: dict[str, Any] = pickle.load(self._process.stdout)  # noqa: S301 (our own child)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait()
            why = f"its process ended with status {code}"
            if hangs.is_set():
                why = f"it gave no answer for {PATIENCE_S:g} s"
            raise ProviderError(f"{why}{self._last_words()}") from None
        finally:
            watchdog.cancel()
        if "error" in answer:
            raise ProviderError(answer["error"])
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def engine(model: str, provider: str, threads: int | None) -> Candidate:
    """The factory for our own engine."""
    from dataclasses import asdict

    from deblur_deploy.runtime.engine import DeblurEngine

    made = DeblurEngine(model, provider, threads=threads)
    facts = {"receipt": asdict(made.receipt), "text": str(made.receipt)}
    return Candidate(restore=made, facts=facts, threads=made.receipt.threads)


def peak_mb() -> float | None:
    """The most memory that this process has had, in MB (VmHWM, since getrusage begins with the parent's)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), None)


def _send(pipe: IO[bytes], message: object) -> None:
    pickle.dump(message, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def _answer(state: dict[str, Any], kind: str, *arguments: Any) -> dict[str, Any]:
    start = time.perf_counter()
    if kind == "load":
        factory, keywords = arguments
        module, _, function = factory.partition(":")
        candidate = getattr(import_module(module), function)(**keywords)
        state["restore"], state["facts"], state["threads"] = candidate.restore, candidate.facts, candidate.threads
        return {"ms": 1e3 * (time.perf_counter() - start)}
    if kind == "facts":
        return {"facts": state["facts"]}
    if kind == "restore":
        return {"image": state["restore"](arguments[0])}
    if kind == "keep":
        state["image"] = arguments[0]
    if kind == "run":
        return {"lap": own_clock(lambda: state["restore"](state["image"]), state["threads"])}
    return {"mb": peak_mb()}


def _serve() -> None:
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    # What libraries print must not end up among the answers.
    os.dup2(2, 1)
    state: dict[str, Any] = {}
    while True:
        try:
            message = pickle.load(requests)  # noqa: S301 (our own parent)
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = _answer(state, *message)
        except KeyboardInterrupt:
            return
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            answer = {"error": text if isinstance(error, DeblurError) else f"{type(error).__name__}: {text[:300]}"}
        try:
            _send(answers, answer)
        except BrokenPipeError:
            return


if __name__ == "__main__":
    _serve()
