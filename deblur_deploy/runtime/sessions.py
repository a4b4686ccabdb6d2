"""Sessions of one model on one provider: one for any shape, and a few for the shapes that come often.

A session whose free dimensions are fixed is up to twice as fast as the same file run at any shape, and costs its
compile time and memory once; so a shape earns one by coming back.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from math import prod
from statistics import median_low
from threading import Lock, RLock, active_count
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deblur_deploy.contract import INPUT, OUTPUT
from deblur_deploy.errors import ModelError, ProviderError
from deblur_deploy.runtime.assignment import assignment
from deblur_deploy.runtime.providers import Provider, find
from deblur_deploy.runtime.session import Session, Shape, failure, read_contract
from deblur_deploy.runtime.tiling import up
from deblur_deploy.system.forks import ForkedLock
from deblur_deploy.system.memory import give_back, resident_bytes

MAX_FIXED = 4
"""Fixed-shape sessions that one model keeps."""

_PROBE_PX = 384
_LEAST_BYTES_PER_PIXEL, _USUAL_BYTES_PER_PIXEL = 48, 256

SURELY_FITS_BYTES_PER_PIXEL = 2500
"""What the heaviest network takes that we know of: full resolution, 64 channels, fp32."""

_OFTEN = 2
_OFTEN_WHEN_FULL = 16

_turn = ForkedLock(RLock)
# Every session without a thread count of its own uses all cores, so such sessions compute one after the other:
# two at once would only take each other's cores.


class Sessions:
    """Runs one ``.onnx``; safe to call from many threads.

    ``data`` is the file's content and ``where`` its name for messages.  ``own_threads`` says that ``threads`` was
    asked for, so that these sessions take no turns with others.  ``fixing`` lets shapes earn sessions of their own.
    Raises ModelError if the content is no model that keeps the contract, ProviderError if the provider refuses it.
    """

    def __init__(
        self,
        data: bytes,
        where: object,
        provider: Provider,
        *,
        precision: str = "auto",
        threads: int,
        own_threads: bool = False,
        budget: int,
        extra: Mapping[str, str] | None = None,
        fixing: bool = True,
    ) -> None:
        self.data, self.where, self.provider = data, where, provider
        self.threads, self._extra = threads, dict(extra or {})
        self._budget, self._fixing = budget, fixing
        self._shared = provider.kind == "CPU" and not own_threads
        self._fixed: OrderedDict[Shape, Session] = OrderedDict()
        self._seen: Counter[Shape] = Counter()
        self._refused: set[Shape] = set()
        self._creating, self._counting = Lock(), Lock()
        self._bytes_per_pixel: int | None = None
        start = perf_counter()
        # The contract is read before the provider is asked, so that a stranger's file is not blamed on the provider.
        self.contract = read_contract(data, where)
        self.effective_precision = provider.arithmetic(self.contract.precision, precision)
        self._any = self._create(None)
        self.load_ms = 1e3 * (perf_counter() - start)
        side = 4 * self.contract.size_divisor
        image = np.zeros(self._shape(side, side), self.dtype)
        self.assignment = assignment(self._any.bare, data, image)
        if self.assignment.macs and not self.assignment.macs.get(provider.name):
            raise ProviderError(f"{provider.name} took no convolution of {where}; use another provider or variant")
        start = perf_counter()
        self.run(image)
        self.warm_up_ms = 1e3 * (perf_counter() - start)

    @property
    def dtype(self) -> type[np.uint8] | type[np.float32]:
        return np.uint8 if self.contract.io == "uint8" else np.float32

    @property
    def bytes_per_pixel(self) -> int:
        """Memory for activations that one pixel of an image takes, measured once."""
        with self._creating:
            if self._bytes_per_pixel is None:
                self._bytes_per_pixel = self._measure_memory()
            return self._bytes_per_pixel

    def _measure_memory(self) -> int:
        # ONNX Runtime does not tell; but its arena keeps what a run took, so the process grows by just that.
        # On the CPU the session for any shape will do: another would only add to what is to be known.
        own = self.provider if self.provider.kind == "CPU" else find("cpu")
        session = self._any if self.provider.name == "cpu" else self._create(None, own)
        small = up(_PROBE_PX // 4, self.contract.size_divisor)
        large = max(up(_PROBE_PX, self.contract.size_divisor), 4 * small)
        little, much = (np.zeros(self._shape(side, side), self.dtype) for side in (small, large))
        grown = []
        try:
            # What other threads do meanwhile counts too, as decoding the next image.
            for _ in range(3 if active_count() > 1 else 1):
                with _turn:
                    session.bare.run([OUTPUT], {INPUT: little})
                    give_back()  # or what is free already would be taken, and nothing grow
                    before = resident_bytes()
                    session.bare.run([OUTPUT], {INPUT: much})
                    after = resident_bytes()
                    session(little)  # gives back what it kept
                if before is None or after is None:
                    return self._guessed_memory()
                grown.append(after - before)
        except Exception as error:
            raise failure(error, own.name, f"failed on {self.where}") from None
        if (growth := median_low(grown)) <= 0:
            return self._guessed_memory()
        # A compiled shape takes up to half as much again.
        return max(_LEAST_BYTES_PER_PIXEL, 3 * growth // (2 * large * large))

    def _guessed_memory(self) -> int:
        # What computes more for a pixel holds more of it; the heaviest of ours takes 2500 bytes for 213,000.
        return max(_USUAL_BYTES_PER_PIXEL, int(self.contract.macs_per_pixel / 80))

    def run(self, batch: NDArray[Any], *, often: bool = False) -> NDArray[Any]:
        """Restore a C-contiguous batch in the layout and dtype of the contract; ``often`` fixes its shape at once.

        Raises MemoryLimitError or ProviderError.
        """
        session = self._session(batch.shape, often)
        proven = session is self._any or session.proven
        try:
            restored = self._call(session, batch)
        except (ProviderError, MemoryError) as error:
            if proven:
                raise
            # It compiled, but cannot run: it would only have been faster, and the session for any shape is there.
            self._refuse(batch.shape)
            warnings.warn(f"shape {batch.shape} is not compiled: {error}", RuntimeWarning, stacklevel=2)
            restored = self._call(self._any, batch)
        if restored.shape != batch.shape or restored.dtype != batch.dtype:
            raise ModelError(f"{self.where} answered {restored.dtype}{restored.shape} to {batch.dtype}{batch.shape}")
        return restored

    def _call(self, session: Session, batch: NDArray[Any]) -> NDArray[Any]:
        with _turn if self._shared else nullcontext():
            try:
                return session(batch)
            except Exception as error:
                raise failure(error, self.provider.name, f"failed on {self.where}") from None

    def _session(self, shape: Shape, often: bool) -> Session:
        with self._counting:
            if shape in self._fixed:
                self._fixed.move_to_end(shape)
                return self._fixed[shape]
            if shape in self._refused or not self._fixing:
                return self._any
            self._seen[shape] += 1
            if len(self._seen) > 256:
                self._seen = Counter(dict(self._seen.most_common(64)))
            # What would have to leave for it comes back as well: compiling takes longer than many runs.
            needed = _OFTEN if not self._fixed or self._has_room(shape) else _OFTEN_WHEN_FULL
            wanted = often or self._seen[shape] >= needed
        # Whoever finds another thread compiling does not wait for it: the session for any shape is there.
        if not wanted or not self._creating.acquire(blocking=often):
            return self._any
        try:
            with self._counting:
                if shape in self._fixed:
                    return self._fixed[shape]
                evicted = self._make_room(shape)
            if evicted:
                evicted.clear()
                give_back()
            try:
                session = self._create(shape)
            except Exception:  # it would only have been faster
                self._refuse(shape)
                return self._any
            with self._counting:
                self._fixed[shape] = session
                del self._seen[shape]
            return session
        finally:
            self._creating.release()

    def _refuse(self, shape: Shape) -> None:
        with self._counting:
            if len(self._refused) >= 256:
                self._refused.clear()
            self._refused.add(shape)
            self._fixed.pop(shape, None)

    def _make_room(self, shape: Shape) -> list[Session]:
        """Those that had to leave, for the caller to release."""
        evicted: list[Session] = []
        while self._fixed and not self._has_room(shape):
            evicted.append(self._fixed.popitem(last=False)[1])
        return evicted

    def _has_room(self, shape: Shape) -> bool:
        """Whether a session for ``shape`` fits beside those that there are."""
        # Each session keeps what its shape takes, so all of them together must fit where one large image would.
        per_pixel = self._bytes_per_pixel or SURELY_FITS_BYTES_PER_PIXEL
        values = prod(shape) + sum(prod(other) for other in self._fixed)
        return len(self._fixed) < MAX_FIXED and values // 3 * per_pixel <= self._budget

    def _shape(self, height: int, width: int) -> Shape:
        return (1, height, width, 3) if self.contract.io == "uint8" else (1, 3, height, width)

    def _create(self, shape: Shape | None, provider: Provider | None = None) -> Session:
        return Session(
            self.data,
            self.where,
            provider or self.provider,
            shape,
            io=self.contract.io,
            precision=self.effective_precision,
            threads=self.threads,
            extra=self._extra if provider in (None, self.provider) else {},
        )
