"""Sessions of one model on one provider: one for any shape, and a few for the shapes that come often.

A session whose free dimensions are fixed is up to twice as fast as the same file run at any shape, and costs its
compile time and memory once; so a shape earns one by coming back.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from threading import Lock, RLock
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deblur_deploy.contract import BATCH_DIM, HEIGHT_DIM, INPUT, OUTPUT, WIDTH_DIM, ModelContract
from deblur_deploy.errors import MemoryLimitError, ModelError, ProviderError
from deblur_deploy.runtime.memory import resident_bytes
from deblur_deploy.runtime.providers import NAMES, Provider, find, first_line

MAX_FIXED = 4
"""Fixed-shape sessions that one model keeps."""

_PROBE_PX = 384
_LEAST_BYTES_PER_PIXEL, _USUAL_BYTES_PER_PIXEL, _MOST_BYTES_PER_PIXEL = 48, 256, 8192

SURELY_FITS_BYTES_PER_PIXEL = 2500
"""What the heaviest network takes that we know of: full resolution, 64 channels, fp32."""

_OFTEN = 2
_OFTEN_WHEN_FULL = 16

_turn = RLock()
# Every session without a thread count of its own uses all cores, so such sessions compute one after the other:
# two at once would only take each other's cores.


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Shares of the graph by provider."""

    nodes: dict[str, float]
    convolutions: dict[str, float]


class Sessions:
    """Runs one ``.onnx``; safe to call from many threads.

    ``data`` is the file's content and ``where`` its name for messages.  ``own_threads`` says that ``threads`` was
    asked for, so that these sessions take no turns with others.
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
    ) -> None:
        self._data, self._where, self.provider = data, where, provider
        self._threads, self._extra = threads, dict(extra or {})
        self._budget = budget
        self._shared = provider.kind == "CPU" and not own_threads
        self._fixed: OrderedDict[tuple[int, ...], _Fixed] = OrderedDict()
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._refused: set[tuple[int, ...]] = set()
        self._creating, self._counting = Lock(), Lock()
        self._bytes_per_pixel: int | None = None
        start = perf_counter()
        # The contract is read before the provider is asked, so that a stranger's file is not blamed on the provider.
        self.contract = _read_contract(data, where)
        self.effective_precision = provider.arithmetic(self.contract.precision, precision)
        session = self._create(None)
        self.load_ms = 1e3 * (perf_counter() - start)
        self.assignment = _assignment(session)
        if not self.assignment.convolutions.get(provider.name):
            raise ProviderError(f"{provider.name} took no convolution of {where}; use another provider or variant")
        self._any = _Fixed(session, None)
        start = perf_counter()
        side = 4 * self.contract.size_divisor
        self.run(np.zeros(self._shape(side, side), self.dtype))
        self.warm_up_ms = 1e3 * (perf_counter() - start)

    @property
    def dtype(self) -> type[np.uint8] | type[np.float32]:
        return np.uint8 if self.contract.io == "uint8" else np.float32

    @property
    def bytes_per_pixel(self) -> int:
        """Memory for activations that one pixel of an image takes, measured once in a session of its own."""
        with self._creating:
            if self._bytes_per_pixel is None:
                self._bytes_per_pixel = self._measure_memory()
            return self._bytes_per_pixel

    def _measure_memory(self) -> int:
        # ONNX Runtime does not tell; but its arena keeps what a run took, so the process grows by just that.
        provider = self.provider if self.provider.kind == "CPU" else find("cpu")
        session = self._create(None, provider)
        small, large = _up(_PROBE_PX // 4, self.contract.size_divisor), _up(_PROBE_PX, self.contract.size_divisor)
        with _turn:
            session.run([OUTPUT], {INPUT: np.zeros(self._shape(small, small), self.dtype)})
            before = resident_bytes()
            session.run([OUTPUT], {INPUT: np.zeros(self._shape(large, large), self.dtype)})
            after = resident_bytes()
        if before is None or after is None:
            return _USUAL_BYTES_PER_PIXEL
        # A compiled shape takes up to half as much again.
        measured = 3 * (after - before) // (2 * large * large)
        return min(max(_LEAST_BYTES_PER_PIXEL, measured), _MOST_BYTES_PER_PIXEL)

    def run(self, batch: NDArray[Any], *, often: bool = False) -> NDArray[Any]:
        """Restore a C-contiguous batch in the layout and dtype of the contract; ``often`` fixes its shape at once.

        Raises MemoryLimitError or ProviderError.
        """
        runner = self._runner(batch.shape, often)
        with _turn if self._shared else nullcontext():
            try:
                restored = runner(batch)
            except Exception as error:  # ONNX Runtime's own derive from nothing more narrow
                raise _failure(error, self.provider.name, f"failed on {self._where}") from None
        if restored.shape != batch.shape or restored.dtype != batch.dtype:
            raise ModelError(f"{self._where} answered {restored.dtype}{restored.shape} to {batch.dtype}{batch.shape}")
        return restored

    def _runner(self, shape: tuple[int, ...], often: bool) -> _Fixed:
        with self._counting:
            if shape in self._fixed:
                self._fixed.move_to_end(shape)
                return self._fixed[shape]
            if shape in self._refused:
                return self._any
            self._seen[shape] += 1
            if len(self._seen) > 256:
                self._seen = Counter(dict(self._seen.most_common(64)))
            needed = _OFTEN if len(self._fixed) < MAX_FIXED else _OFTEN_WHEN_FULL
            wanted = often or self._seen[shape] >= needed
        # Whoever finds another thread compiling does not wait for it: the session for any shape is there.
        if not wanted or not self._creating.acquire(blocking=often):
            return self._any
        try:
            with self._counting:
                if shape in self._fixed:
                    return self._fixed[shape]
                self._make_room(shape)
            try:
                session = _Fixed(self._create(shape), shape, self.provider.device_id)
            except Exception:  # it would only have been faster, and the session for any shape is there
                with self._counting:
                    if len(self._refused) >= 256:
                        self._refused.clear()
                    self._refused.add(shape)
                return self._any
            with self._counting:
                self._fixed[shape] = session
                del self._seen[shape]
            return session
        finally:
            self._creating.release()

    def _make_room(self, shape: tuple[int, ...]) -> None:
        # Each session keeps what its shape takes, so all of them together must fit where one large image would.
        per_pixel = self._bytes_per_pixel or SURELY_FITS_BYTES_PER_PIXEL
        while self._fixed:
            values = prod(shape) + sum(prod(other) for other in self._fixed)
            if len(self._fixed) < MAX_FIXED and values // 3 * per_pixel <= self._budget:
                return
            self._fixed.popitem(last=False)

    def _shape(self, height: int, width: int) -> tuple[int, ...]:
        return (1, height, width, 3) if self.contract.io == "uint8" else (1, 3, height, width)

    def _create(self, shape: tuple[int, ...] | None, provider: Provider | None = None) -> ort.InferenceSession:
        provider = provider or self.provider
        options = ort.SessionOptions()
        # Failures are raised; what ONNX Runtime would print besides is not for our callers' terminals.
        options.log_severity_level = 4
        options.intra_op_num_threads = self._threads
        # A memory pattern is laid out beside what the first run took, so it doubles memory; it does not save time.
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if shape is not None:
            height, width = shape[1:3] if self.contract.io == "uint8" else shape[2:]
            for name, size in ((BATCH_DIM, shape[0]), (HEIGHT_DIM, height), (WIDTH_DIM, width)):
                options.add_free_dimension_override_by_name(name, size)
        if provider.plugin_device is None and provider.ort_name not in ort.get_available_providers():
            raise ProviderError(f"{provider.name} is not in this build of onnxruntime; use another provider")
        try:
            providers = provider.configure(
                options,
                precision=self.effective_precision,
                threads=self._threads,
                fixed=shape is not None,
                extra=self._extra if provider is self.provider else {},
            )
            session = ort.InferenceSession(
                self._data, options, providers or None, enable_fallback=0, read_config_from_model=0
            )
        except Exception as error:
            raise _failure(error, provider.name, f"cannot load {self._where}") from None
        # Else a failing run would be repeated on the CPU, with a line on standard output for all notice.
        session.disable_fallback()
        if session.get_providers()[0] != provider.ort_name:
            raise ProviderError(f"{provider.name} did not load {self._where}; onnxruntime fell back by itself")
        return session


class _Fixed:
    """One session as a function of a batch; on CUDA with fixed shapes it keeps its buffers on the device."""

    def __init__(self, session: ort.InferenceSession, shape: tuple[int, ...] | None, device_id: int = 0) -> None:
        self._session = session
        self._binding = None
        # The session for any shape gives its memory back after each run: it would otherwise keep what the largest
        # image took, for good.
        self._options = ort.RunOptions() if shape is None and session.get_providers() == [NAMES["cpu"]] else None
        if self._options is not None:
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        if shape is not None and session.get_providers()[0] == NAMES["cuda"]:
            # A captured CUDA graph replays on the same addresses, so one call at a time may use them.
            dtype = np.uint8 if session.get_inputs()[0].type == "tensor(uint8)" else np.float32
            self._lock = Lock()
            self._image = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", device_id)
            self._restored = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", device_id)
            self._binding = session.io_binding()
            self._binding.bind_ortvalue_input(INPUT, self._image)
            self._binding.bind_ortvalue_output(OUTPUT, self._restored)

    def __call__(self, batch: NDArray[Any]) -> NDArray[Any]:
        if self._binding is None:
            restored: NDArray[Any] = self._session.run([OUTPUT], {INPUT: batch}, self._options)[0]
            return restored
        with self._lock:
            self._image.update_inplace(batch)
            self._session.run_with_iobinding(self._binding)
            copied: NDArray[Any] = self._restored.numpy()
            return copied


def _failure(error: Exception, provider: str, what: str) -> MemoryLimitError | ProviderError:
    message = first_line(error)
    if isinstance(error, MemoryError) or any(word in message.lower() for word in ("alloc", "out of memory")):
        return MemoryLimitError(f"{provider} has too little memory: {message}")
    return ProviderError(f"{provider} {what}: {message}")


def _up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor


def _read_contract(data: bytes, where: object) -> ModelContract:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(
            data, options, ["CPUExecutionProvider"], enable_fallback=0, read_config_from_model=0
        )
    except Exception as error:
        raise ModelError(
            f"{where} is not an ONNX model that onnxruntime {ort.__version__} reads: {first_line(error)}"
        ) from None
    try:
        metadata = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError:
        raise ModelError(f"{where} has metadata that is no text; export it again") from None
    contract = ModelContract.from_metadata(metadata, where)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    kind = "tensor(uint8)" if contract.io == "uint8" else "tensor(float)"
    channel = 3 if contract.io == "uint8" else 1
    promised = [
        len(inputs) == len(outputs) == 1,
        [node.name for node in (*inputs, *outputs)] == [INPUT, OUTPUT],
        all(node.type == kind and len(node.shape) == 4 and node.shape[channel] == 3 for node in inputs),
        all(node.type == kind and len(node.shape) == 4 for node in outputs),
        contract.size_divisor >= 1 and contract.receptive_radius_px >= 0,
    ]
    if not all(promised):
        raise ModelError(f"{where} does not keep the contract that it carries; export it again with deblur-export")
    return contract


def _assignment(session: ort.InferenceSession) -> Assignment:
    short = {value: key for key, value in NAMES.items()}
    nodes: Counter[str] = Counter()
    convolutions: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        name = short.get(part.ep_name, part.ep_name)
        for node in part.get_nodes():
            nodes[name] += 1
            convolutions[name] += "Conv" in node.op_type
    return Assignment(nodes=_shares(nodes), convolutions=_shares(convolutions))


def _shares(counts: Counter[str]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items() if count}
