"""One ONNX Runtime session: nothing falls back in silence, and what the file promises is checked."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deblur_deploy.contract import BATCH_DIM, HEIGHT_DIM, INPUT, OUTPUT, WIDTH_DIM, ModelContract
from deblur_deploy.errors import MemoryLimitError, ModelError, ProviderError
from deblur_deploy.runtime.providers import NAMES, Provider, first_line
from deblur_deploy.system import forks

Shape = tuple[int, ...]
"""Of a batch, in the layout of the contract."""


class Session:
    """One session as a function of a batch; on CUDA with a fixed shape it keeps its buffers on the device.

    ``shape`` fixes the graph's free dimensions, None leaves them free.
    Raises ProviderError if the provider refuses the model, MemoryLimitError if it has too little memory for it.
    """

    def __init__(
        self,
        data: bytes,
        where: object,
        provider: Provider,
        shape: Shape | None,
        *,
        io: str,
        precision: str,
        threads: int,
        extra: Mapping[str, str],
    ) -> None:
        options = ort.SessionOptions()
        # Failures are raised; what ONNX Runtime would print besides is not for our callers' terminals.
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        # A memory pattern is laid out beside what the first run took, so it doubles memory; it does not save time.
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if shape is not None:
            height, width = shape[1:3] if io == "uint8" else shape[2:]
            for name, size in ((BATCH_DIM, shape[0]), (HEIGHT_DIM, height), (WIDTH_DIM, width)):
                options.add_free_dimension_override_by_name(name, size)
        if provider.plugin_device is None and provider.ort_name not in ort.get_available_providers():
            raise ProviderError(f"{provider.name} is not in this build of onnxruntime; use another provider")
        try:
            providers = provider.configure(
                options, precision=precision, threads=threads, fixed=shape is not None, extra=extra
            )
            session = ort.InferenceSession(
                data, options, providers or None, enable_fallback=0, read_config_from_model=0
            )
        except Exception as error:
            raise failure(error, provider.name, f"cannot load {where}") from None
        # Else a failing run would be repeated on the CPU, with a line on standard output for all notice.
        session.disable_fallback()
        if session.get_providers()[0] != provider.ort_name:
            raise ProviderError(f"{provider.name} did not load {where}; onnxruntime fell back by itself")
        forks.tell(self)
        self.bare, self._binding = session, None
        """ONNX Runtime's own session."""
        self.proven = False
        """Whether it has run once."""
        # The session for any shape gives its memory back after each run: it would otherwise keep what the largest
        # image took, for good.
        self._options = ort.RunOptions() if shape is None and provider.name == "cpu" else None
        if self._options is not None:
            self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        if shape is not None and provider.name == "cuda":
            # A captured CUDA graph replays on the same addresses, so one call at a time may use them.
            dtype = np.uint8 if io == "uint8" else np.float32
            self._lock = Lock()
            self._image = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", provider.device_id)
            self._restored = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", provider.device_id)
            self._binding = session.io_binding()
            self._binding.bind_ortvalue_input(INPUT, self._image)
            self._binding.bind_ortvalue_output(OUTPUT, self._restored)

    def after_fork(self) -> None:
        """It is of no use in the child, where its destructor would wait for threads that stayed behind."""
        forks.never_release(self)

    def __call__(self, batch: NDArray[Any]) -> NDArray[Any]:
        if self._binding is None:
            restored: NDArray[Any] = self.bare.run([OUTPUT], {INPUT: batch}, self._options)[0]
        else:
            with self._lock:
                self._image.update_inplace(batch)
                self.bare.run_with_iobinding(self._binding)
                restored = self._restored.numpy()
        self.proven = True
        return restored


def failure(error: Exception, provider: str, what: str) -> MemoryLimitError | ProviderError:
    """Our error for one of ONNX Runtime's, which derive from nothing more narrow than Exception."""
    message = first_line(error)
    if isinstance(error, MemoryError) or any(word in message.lower() for word in ("alloc", "out of memory")):
        return MemoryLimitError(f"{provider} has too little memory: {message}")
    return ProviderError(f"{provider} {what}: {message}")


def read_contract(data: bytes, where: object) -> ModelContract:
    """The contract in the metadata of ``data``, an ``.onnx`` file's content; ``where`` is named in errors.

    Raises ModelError if it is no model that this onnxruntime reads, or one that does not keep its contract.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(data, options, [NAMES["cpu"]], enable_fallback=0, read_config_from_model=0)
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
    ]
    if not all(promised):
        raise ModelError(f"{where} does not keep the contract that it carries; export it again with deblur-export")
    return contract
