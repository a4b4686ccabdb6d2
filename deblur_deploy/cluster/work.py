"""Restoring many images on the machines of a Ray cluster.

Ray Data starts the workers, hands them work as they ask for it, and does again what a lost one had.  Only names travel:
each worker reads, restores and writes its images itself, with the functions of ``deblur-run``, so the files are the
same to the byte.  A worker skips what is written already, so work that is done again costs what was not finished.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deblur_deploy.bundles.hub import fetched, url
from deblur_deploy.bundles.manifest import MANIFEST, Bundle
from deblur_deploy.bundles.names import located
from deblur_deploy.cluster import places
from deblur_deploy.errors import DeblurError, InputError, ProviderError, about
from deblur_deploy.media.images import MAX_PIXELS, Photo, read_photo, write_photo
from deblur_deploy.media.opencv import silence
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.streams import overlapped
from deblur_deploy.system.threads import usable_cores

MOST_IN_BLOCK = 64
"""Images in one piece of work: enough to hide what a piece costs, few enough to see progress."""

_OWN = (DeblurError, OSError, MemoryError)
"""What goes wrong with one image, and with no other."""

_GPU_PROVIDERS = ("cuda", "tensorrt")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One image: paths or URLs that mean the same on every machine."""

    source: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one task."""

    source: str
    target: str
    error: str
    """Empty, or one line that says what is wrong with this image."""
    lost: str
    """Empty, or what the image had beside its pixels and the result lacks."""
    worker: str
    """``host:process``."""
    broken: bool
    """Whether the worker, and not the image, is what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a worker needs to know."""

    model: tuple[str, Mapping[str, bytes]] | None
    """Name and content of the files, which travel with the work; None is the model that ships with the package."""
    provider: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    max_memory_mb: float | None = None
    max_pixels: int = MAX_PIXELS
    overwrite: bool = False


def packed(model: Path | None) -> tuple[str, Mapping[str, bytes]] | None:
    """A bundle (by path, name or URL) or ``.onnx`` file for ``Settings``; raises MissingFileError or ModelError."""
    if model is None:
        return None
    place = url(model)
    model = fetched(place) if place else located(model)
    if model.is_dir():
        files = [model / MANIFEST, *(variant.path for variant in Bundle.read(model).variants.values())]
        return model.resolve().name, {path.name: path.read_bytes() for path in files}
    with DeblurEngine(model, "cpu"):  # raises what is wrong with it
        return model.name, {"": model.read_bytes()}


class Worker:
    """An engine in a process of its own on some machine of the cluster."""

    def __init__(self, settings: Settings) -> None:
        silence()
        self._settings = settings
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._engine: DeblurEngine | None = None
        self._broken = ""
        try:
            self._engine = self._load()
        except (DeblurError, OSError) as error:
            # Raised here it would come out as Ray's, after many attempts.
            self._broken = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        tasks = [Task(source=source, target=target) for source, target in zip(*_columns(batch), strict=True)]
        outcomes = [self._outcome(task, result) for task, result in overlapped(self._read(tasks), self._restored)]
        return {name: np.array([getattr(outcome, name) for outcome in outcomes]) for name in Outcome.__annotations__}

    def _load(self) -> DeblurEngine:
        where: Path | None = None
        if self._settings.model is not None:
            name, files = self._settings.model
            folder = tempfile.mkdtemp(prefix="deblur-model-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            where = Path(folder) / name
            if "" not in files:
                where.mkdir()
            for file, content in files.items():
                (where / file).write_bytes(content)
        given = self._settings
        return DeblurEngine(
            where, given.provider, given.precision, threads=given.threads, max_memory_mb=given.max_memory_mb
        )

    def _read(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Photo | BaseException | None]]:
        for task in tasks:
            try:
                # Written before the worker that had this task was lost.
                if self._broken or (not self._settings.overwrite and places.exists(task.target)):
                    yield task, None
                    continue
                with places.reading(task.source) as path:
                    yield task, read_photo(path, max_pixels=self._settings.max_pixels)
            except _OWN as error:
                yield task, error

    def _restored(self, read: tuple[Task, Photo | BaseException | None]) -> tuple[Task, Photo | BaseException | None]:
        task, photo = read
        if not isinstance(photo, Photo) or self._engine is None:
            return read
        try:
            return task, photo.restored(self._engine)
        except _OWN as error:
            return task, error

    def _outcome(self, task: Task, result: Photo | BaseException | None) -> Outcome:
        error, lost = self._broken, ""
        try:
            if isinstance(result, BaseException):
                raise result
            if result is not None:
                with places.writing(task.target) as path:
                    write_photo(path, result, kind=result.beside.format if result.beside else None)
                lost = " and without ".join(result.beside.lost) if result.beside else ""
        except _OWN as failed:
            error = about(task.source, failed)
        return Outcome(
            source=task.source,
            target=task.target,
            error=error,
            lost=lost,
            worker=self._name,
            broken=bool(self._broken),
        )


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Ray at ``address`` (``auto``, HOST:PORT or ray://HOST:PORT) while the block runs; None starts it on this machine.

    A connection that this process has already is used and left.  Raises InputError for an address without a cluster.
    """
    # Ray would tell its makers of every start, and calls it an error how Ray Data starts its own workers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Here, since nothing else needs it.
    import ray

    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        ray.init("local", num_cpus=usable_cores(), include_dashboard=False, object_store_memory=2**28, **quiet)
    else:
        try:
            _reach(address)
            ray.init(address, **quiet)
        except (OSError, ValueError, OverflowError, RuntimeError) as error:
            # Something answers there, and a token that is missing is told by Ray's own threads alone.
            token = "" if isinstance(error, OSError) else "; for one that asks for a token set RAY_AUTH_MODE=token"
            raise InputError(
                f"no Ray cluster at {address} ({_last_line(error)}); give HOST:PORT, or no address for this machine"
                f"{token}"
            ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    # Ray itself would try for a long time, and tell of it in many lines.
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()


def restore(tasks: Sequence[Task], settings: Settings) -> Iterator[Outcome]:
    """Restore ``tasks`` on the :func:`connected` cluster; outcomes come in no order, each once.

    Raises ProviderError if a worker cannot run the model or the cluster fails, InputError if there is no room for one.
    Closing the iterator ends the work; what is written stays.
    """
    import ray

    try:
        yield from _outcomes(ray, tasks, settings)
    except ray.exceptions.RayError as error:
        raise ProviderError(f"the cluster failed: {_last_line(error)}") from None


def _outcomes(ray: Any, tasks: Sequence[Task], settings: Settings) -> Iterator[Outcome]:
    from ray.data import ActorPoolStrategy, DataContext, from_items

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    size, cores, gpus = pool(nodes, settings)
    settings = replace(settings, threads=settings.threads or cores)
    in_block = max(1, min(MOST_IN_BLOCK, len(tasks) // (4 * size)))
    found = (
        from_items([vars(task) for task in tasks], override_num_blocks=-(-len(tasks) // in_block))
        .map_batches(
            _Remote,
            batch_size=in_block,
            batch_format="numpy",
            compute=ActorPoolStrategy(min_size=1, max_size=min(size, len(tasks))),
            num_cpus=cores,
            num_gpus=gpus,
            fn_constructor_args=(ray.put(settings),),
        )
        .iter_rows()
    )
    for row in found:
        outcome = Outcome(**row)
        if outcome.broken:
            raise ProviderError(f"worker {outcome.worker} cannot restore: {outcome.error}")
        yield outcome


class _Remote(Worker):
    """A worker whose settings, model and all, lie in the cluster's memory, once a machine."""

    def __init__(self, settings: Any) -> None:
        import ray

        super().__init__(ray.get(settings) if isinstance(settings, ray.ObjectRef) else settings)


def pool(nodes: Sequence[Mapping[str, float]], settings: Settings) -> tuple[int, int, int]:
    """Number of workers, and the cores and GPUs of each, for what the ``nodes`` have.

    A worker has a GPU if there are any and the provider may use it; else as many cores as ``threads`` says, by default
    all those of the smallest node.  Raises InputError if no node has room for one.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus and settings.provider.partition(":")[0] in ("auto", *_GPU_PROVIDERS):
        return gpus, 1, 1
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    each = settings.threads or min(cores, default=1)
    size = sum(have // each for have in cores)
    if not size:
        raise InputError(f"no node of the cluster has {each} free cores for a worker; give fewer --threads")
    return size, each, 0


def _columns(batch: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    return list(map(str, batch["source"])), list(map(str, batch["target"]))


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
