"""DeblurEngine: deblurring inside somebody else's program.

    from deblur_deploy import DeblurEngine
    engine = DeblurEngine()
    sharp = engine(blurry)

It runs on numpy and ONNX Runtime alone.  What it adds to a bare ``session.run`` is what an app would otherwise have to
find out by itself: a provider that really runs, the right file for it, shapes that are compiled once, images of any
type and size, memory that stays bounded, and a receipt that says what happened.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

from numpy.typing import NDArray

from deblur_deploy.bundles.manifest import Bundle
from deblur_deploy.bundles.models import content, found
from deblur_deploy.contract import ModelContract
from deblur_deploy.errors import DeblurError, InputError, MemoryLimitError, ModelError, ProviderError
from deblur_deploy.runtime.arguments import checked
from deblur_deploy.runtime.pixels import Layout
from deblur_deploy.runtime.providers import Provider, candidates, check_onnxruntime, find, versions
from deblur_deploy.runtime.receipt import Receipt
from deblur_deploy.runtime.restoring import restore
from deblur_deploy.runtime.sessions import Sessions
from deblur_deploy.runtime.streams import overlapped
from deblur_deploy.runtime.tuned import Tuned, load
from deblur_deploy.runtime.variants import choose_variant, float_variant, within_budget
from deblur_deploy.runtime.whole import Tiles, restore_whole
from deblur_deploy.system.forks import ForkedLock, tell
from deblur_deploy.system.memory import budget_bytes, give_back
from deblur_deploy.system.threads import usable_cores

Array = NDArray[Any]


class DeblurEngine:
    """Restores images; one engine may be called from many threads, and pickles as its arguments.

    After a fork the child's first call makes sessions of its own.  Providers other than the CPU do not survive one: a
    named provider then raises ProviderError, ``auto`` goes on with the CPU.

    Args:
        model: a bundle folder or one ``.onnx`` file that deblur-export wrote, or the name of a bundle that ships or is
            installed, such as ``hd-quarter``; None is the model that ships with us.  A bundle may be at a URL, such as
            ``hf://USER/REPO``; it is fetched once, checked and kept (extra ``hub``).
        provider: ``auto`` tries cuda, openvino and cpu; a named provider runs or raises.  ``openvino:gpu`` and
            ``cuda:1`` name one device.  With precision auto too, what ``deblur-bench --tune`` kept comes first.
        precision: ``auto`` is the fastest within 0.1 dB; or fp32, fp16, bf16 (OpenVINO), int8.
        threads: cores to use on the CPU, up to 1024; None is all that the process may use, and then engines take turns.
        max_memory_mb: larger images are cut into tiles; None decides by the free memory.
        options: options of the provider by ONNX Runtime's names; needs a named provider.
        tiles: a network that sees the whole image is not cut, since that changes its result, and an image that is too
            large for memory is refused; ``approximate`` cuts it all the same, into tiles that are blended.

    Raises MissingFileError, ModelError, ProviderError, InputError, or MissingExtraError if onnxruntime is too old.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        provider: str = "auto",
        precision: str = "auto",
        *,
        threads: int | None = None,
        max_memory_mb: float | None = None,
        options: Mapping[str, str] | None = None,
        tiles: Tiles = "exact",
    ) -> None:
        check_onnxruntime()
        if tiles not in get_args(Tiles):
            raise InputError(f"tiles is {tiles!r}; allowed: {', '.join(get_args(Tiles))}")
        self._arguments = {**checked(model, provider, precision, threads, max_memory_mb, options), "tiles": tiles}
        self._precision, self._threads, self._options = precision, threads, options
        self._budget = budget_bytes(max_memory_mb)
        self._source: Bundle | Path = found(model)
        # Whoever unpickles may work in another folder.
        path = self._source.path if isinstance(self._source, Bundle) else self._source
        self._arguments["model"] = None if model is None else str(path.absolute())
        self._lock = ForkedLock()
        self._inherited = False
        self._float: Sessions | None = None
        self._skipped: dict[str, str] = {}
        self._tuned: Tuned | None = None
        self._main, self._variant = self._load(provider)
        self.receipt = self._receipt(self._main, self._variant)
        """What really runs: provider, device, arithmetic, threads."""
        self.float_receipt = self.receipt if self.contract.io == "float32" else None
        """What images of more than 8 bits run on; None until the first of them."""
        tell(self)

    @property
    def contract(self) -> ModelContract:
        """What the loaded model promises."""
        return self._loaded().contract

    def __call__(self, image: Array) -> Array:
        """Restore one image or a batch.

        ``image`` is uint8, uint16 or float32/64 in [0, 1]; HxW (gray), HxWxC or NxHxWxC with C = 1, 3 (RGB) or 4 (RGBA,
        alpha is kept); of any size from 1x1.  The result is a new array of the same dtype and shape; ``image`` is left
        as it was.  More than 8 bits go through the bundle's float variant.

        Raises InputError for anything else, ModelError if the float variant is needed and absent, MemoryLimitError if
        not even a small tile fits, ProviderError if the provider fails.
        """
        layout = Layout.of(image)
        sessions = self._loaded() if layout.exact_in_uint8 else self._for_floats()
        if layout.images.shape[0] == 1 and layout.images.shape[3] == 3:
            return self._restore(sessions, layout, layout.colour(0)).reshape(layout.shape)
        result = layout.result()
        for index in range(len(result)):
            layout.store(result, index, self._restore(sessions, layout, layout.colour(index)))
        return result.reshape(layout.shape)

    def map(self, images: Iterable[Array], *, ahead: int = 2) -> Iterator[Array]:
        """Restore a stream, in order, while the next images are fetched and the last results consumed.

        At most ``ahead`` images wait before and behind the engine.  Errors of ``images`` and of the engine are raised
        here, at their place in the order; closing the iterator or Ctrl-C ends the work.
        """
        if not (isinstance(ahead, int) and ahead >= 1):
            raise InputError(f"ahead is {ahead!r}; allowed: a whole number from 1")
        return overlapped(images, self, ahead=ahead)

    def close(self) -> None:
        """Release the model's memory; the engine cannot be called afterwards."""
        self._main = self._float = None
        self._inherited = False
        give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[], DeblurEngine], tuple[()]]:
        return partial(DeblurEngine, **self._arguments), ()

    def __repr__(self) -> str:
        return f"<DeblurEngine {self.receipt}>"

    def after_fork(self) -> None:
        """In a forked child the sessions are of no use; others are made when they are first needed."""
        self._inherited = self._main is not None

    def _loaded(self) -> Sessions:
        if self._inherited:
            self._open_again()
        main = self._main
        if main is None:
            raise InputError("this engine is closed; make a new one")
        return main

    def _open_again(self) -> None:
        with self._lock:
            if not self._inherited or self._main is None:
                return
            before = self._main
            if before.provider.name == "cpu":
                # From memory: the child may be another user, in another place.
                self._main = self._sessions(before.data, before.where, before.provider, self._precision)
            else:
                why = "its devices and threads do not survive a fork; make the engine in the child, or start by spawn"
                if self._arguments["provider"] != "auto":
                    raise ProviderError(f"{before.provider.name} cannot be used here: {why}")
                self._tuned = None
                self._skip(before.provider.name, why, 5)
                self._main, self._variant = self._open(find("cpu"))
            self._float = None
            self.receipt = self._receipt(self._main, self._variant)
            self.float_receipt = self.receipt if self._main.contract.io == "float32" else None
            self._inherited = False

    def _for_floats(self) -> Sessions:
        main = self._loaded()
        if main.contract.io == "float32":
            return main
        if not isinstance(self._source, Bundle):
            raise InputError(
                f"{self._source} takes uint8 images only; for uint16 or float images load a bundle with a float variant"
            )
        with self._lock:
            if self._float is None:
                variant = float_variant(self._source)
                # Whoever hands in more than 8 bits wants them kept, so no faster arithmetic is chosen here.
                wish = "bf16" if self._precision == "bf16" else "fp32"
                self._float = self._sessions(content(variant.path, variant.sha256), variant.path, main.provider, wish)
                self.float_receipt = self._receipt(self._float, variant.name)
            return self._float

    def _load(self, name: str) -> tuple[Sessions | None, str]:
        if name != "auto":
            return self._open(find(name, self._options))
        place = self._source.path if isinstance(self._source, Bundle) else self._source
        if self._precision == "auto" and (tuned := load(place)):
            self._tuned = tuned
            try:
                return self._open(find(tuned.provider), tuned.variant)
            except DeblurError as error:
                self._tuned = None
                self._skip("tuned", f"{tuned.variant} on {tuned.provider}: {error}")
        providers = candidates(self._skipped)
        for provider in providers:
            try:
                return self._open(provider)
            except (ProviderError, MemoryLimitError) as error:
                if provider is providers[-1]:
                    raise
                self._skip(provider.name, str(error))
        raise ProviderError("no provider is present; reinstall onnxruntime")

    def _skip(self, name: str, why: str, level: int = 4) -> None:
        self._skipped[name] = why
        what = "what was tuned" if name == "tuned" else f"provider {name}"
        warnings.warn(f"{what} is not used: {why}", RuntimeWarning, stacklevel=level)

    def _open(self, provider: Provider, tuned: str | None = None) -> tuple[Sessions, str]:
        if isinstance(self._source, Path):
            sessions = self._sessions(content(self._source), self._source, provider, self._precision)
            is_, wish = sessions.contract.precision, self._precision
            if wish not in ("auto", is_) and not (wish == "bf16" and is_ == "fp32"):
                raise ModelError(f"{self._source} is {is_}, not {wish}; leave precision at auto or load a bundle")
            variant = self._source.stem
        else:
            kept = (variant for variant in within_budget(self._source, provider) if variant.name == tuned)
            chosen = next(kept, None) or choose_variant(self._source, provider, self._precision)
            data = content(chosen.path, chosen.sha256)
            sessions, variant = self._sessions(data, chosen.path, provider, self._precision), chosen.name
        if tuned not in (None, variant):
            raise ModelError(f"{self._source.name} has no variant {tuned!r} within the quality budget")
        if self._precision == "bf16" and sessions.effective_precision != "bf16":
            raise ProviderError(
                f"{provider.name} on {provider.device} cannot compute in bf16; use precision auto or fp32"
            )
        return sessions, variant

    def _sessions(self, data: bytes, where: object, provider: Provider, precision: str) -> Sessions:
        return Sessions(
            data,
            where,
            provider,
            precision=precision,
            threads=self._threads or (self._tuned and self._tuned.threads) or usable_cores(),
            own_threads=self._threads is not None,
            budget=self._budget,
            extra=self._options,
            fixing=self._tuned is None or self._tuned.fixed,
        )

    def _receipt(self, sessions: Sessions | None, variant: str) -> Receipt:
        assert sessions is not None
        return Receipt(
            model=self._source.name,
            variant=variant,
            provider=sessions.provider.name,
            device=sessions.provider.device,
            precision=sessions.contract.precision,
            effective_precision=sessions.effective_precision,
            threads=sessions.threads,
            nodes=sessions.assignment.nodes,
            macs=sessions.assignment.macs,
            load_ms=sessions.load_ms,
            warm_up_ms=sessions.warm_up_ms,
            versions=versions(sessions.provider),
            skipped=dict(self._skipped),
            tuned=self._tuned.date if self._tuned else None,
            tiles=self._tiles_of(sessions.contract),
        )

    def _tiles_of(self, contract: ModelContract) -> str:
        if not contract.sees_everything:
            return "exact"
        return "approximate" if self._arguments["tiles"] == "approximate" else "never"

    def _restore(self, sessions: Sessions, layout: Layout, rgb: Array) -> Array:
        if sessions.contract.sees_everything:
            asked, approximate = self._arguments["max_memory_mb"] is not None, self._arguments["tiles"] == "approximate"
            return restore_whole(sessions, rgb, layout.dtype, budget=self._budget, asked=asked, approximate=approximate)
        tile = self._tuned.tile_pixels if self._tuned and self._arguments["max_memory_mb"] is None else None
        return restore(sessions, rgb, layout.dtype, budget=self._budget, tile_pixels=tile)
