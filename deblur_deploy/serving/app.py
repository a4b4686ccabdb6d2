"""An image in the body of a request, the restored image in the answer.

Plain ASGI, so any server runs it and any ASGI app mounts it.  What is refused is refused early and in one line: the
number of requests is bounded before a body is read, its size while it is read, its pixels before they are decoded.
Requests share one engine, which uses all cores for each image in turn; a batch of equal images would take as long.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from anyio import CapacityLimiter, fail_after, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deblur_deploy.errors import DeblurError, InputError, MemoryLimitError, ModelError
from deblur_deploy.media.headers import pixel_size
from deblur_deploy.media.images import read_photo, write_photo
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.serving.metrics import Metrics

_KINDS = (
    (b"\xff\xd8\xff", ".jpg", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", ".png", "image/png"),
    (b"II*\0", ".tif", "image/tiff"),
    (b"MM\0*", ".tif", "image/tiff"),
    (b"RIFF", ".webp", "image/webp"),
    (b"BM", ".bmp", "image/bmp"),
)
"""First bytes, suffix, media type."""

_AT_ONCE = 2
"""One image is decoded or encoded while another is in the engine."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a service accepts."""

    max_bytes: int = 32 * 10**6
    """Of a request's body; a larger one is answered with 413."""
    max_pixels: int = 64 * 10**6
    """Of an image, as its header states; more are answered with 413 and never decoded."""
    queue: int = 16
    """Requests under way, from the first byte of their body on; one more is answered with 503."""
    body_seconds: float = 30.0
    """For a body to arrive; a slower one is answered with 408."""


def application(engine: DeblurEngine, limits: Limits | None = None) -> Starlette:
    """The ASGI app: ``POST /restore``, ``GET /healthz``, ``GET /metrics``.

    ``/restore`` takes a JPEG, PNG, TIFF, WebP or BMP image as the body and answers with one of the same kind, depth and
    metadata; what cannot be kept is named in the header ``X-Lost``.  Refusals are one line of text: 408, 413, 415 (no
    such image), 422 (damaged), 503 (try again later).
    """
    service = _Service(engine, limits or Limits())
    return Starlette(
        routes=[
            Route("/restore", service.restore, methods=["POST"]),
            Route("/healthz", service.health),
            Route("/metrics", service.measured),
        ]
    )


class _Service:
    def __init__(self, engine: DeblurEngine, limits: Limits) -> None:
        self._engine, self._limits = engine, limits
        self._metrics = Metrics()
        self._under_way = 0
        self._turns = CapacityLimiter(_AT_ONCE)

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "engine": str(self._engine.receipt)})

    async def measured(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type=self._metrics.content_type)

    async def restore(self, request: Request) -> Response:
        started = perf_counter()
        try:
            response = await self._restored(request)
            self._metrics.seconds.observe(perf_counter() - started)
        except HTTPException as refused:
            self._metrics.requests.labels(refused.status_code).inc()
            raise
        except ClientDisconnect:
            # As nginx counts them; nobody is there to read the answer.
            response = Response(status_code=499)
        except BaseException:
            self._metrics.requests.labels(500).inc()
            raise
        self._metrics.requests.labels(response.status_code).inc()
        return response

    async def _restored(self, request: Request) -> Response:
        with self._admitted():
            data = await self._body(request)
            suffix, media_type = self._checked(data)
            async with self._turns:
                # Whoever gave up while waiting is not worked for.
                if await request.is_disconnected():
                    raise ClientDisconnect
                result, lost = await to_thread.run_sync(self._work, data, suffix)
        # What the image had beside its pixels and the result lacks.
        headers = {"X-Lost": "; ".join(lost).encode("ascii", "replace").decode()} if lost else None
        return Response(result, media_type=media_type, headers=headers)

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._under_way >= self._limits.queue:
            raise HTTPException(
                503, f"{self._under_way} images are under way; try again later", headers={"Retry-After": "1"}
            )
        self._under_way += 1
        self._metrics.under_way.set(self._under_way)
        try:
            yield
        finally:
            self._under_way -= 1
            self._metrics.under_way.set(self._under_way)

    async def _body(self, request: Request) -> bytes:
        most, stated = self._limits.max_bytes, request.headers.get("content-length", "")
        too_large = HTTPException(413, f"the body is larger than the limit of {most / 1e6:.4g} MB")
        if stated.isdecimal() and int(stated) > most:
            raise too_large
        data = bytearray()
        try:
            with fail_after(self._limits.body_seconds):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > most:
                        raise too_large
        except TimeoutError:
            raise HTTPException(408, f"the body took more than {self._limits.body_seconds:.4g} s to arrive") from None
        return bytes(data)

    def _checked(self, data: bytes) -> tuple[str, str]:
        kind = next(((suffix, media) for start, suffix, media in _KINDS if data.startswith(start)), None)
        if kind is None or (kind[0] == ".webp" and data[8:12] != b"WEBP"):
            raise HTTPException(415, "the body must be a JPEG, PNG, TIFF, WebP or BMP image and nothing else")
        size, most = pixel_size(data), self._limits.max_pixels
        if size is None:
            raise HTTPException(422, f"the {kind[1]} image in the body is damaged or cut short")
        if size[0] * size[1] > most:
            raise HTTPException(
                413, f"the image states {size[0]}x{size[1]} pixels, the limit is {most / 1e6:.4g} megapixels"
            )
        return kind

    def _work(self, data: bytes, suffix: str) -> tuple[bytes, Sequence[str]]:
        # By way of files, since so every format, depth and metadata is treated as deblur-run does.
        name = f"image{suffix}"
        try:
            with tempfile.TemporaryDirectory(prefix="deblur-serve-") as folder:
                path = Path(folder) / name
                path.write_bytes(data)
                photo = read_photo(path, max_pixels=self._limits.max_pixels)
                started = perf_counter()
                restored = photo.restored(self._engine)
                self._metrics.engine_seconds.observe(perf_counter() - started)
                write_photo(path, restored, kind=photo.beside.format if photo.beside else None)
                self._metrics.pixels.inc(photo.pixels.shape[0] * photo.pixels.shape[1])
                return path.read_bytes(), photo.beside.lost if photo.beside else ()
        except DeblurError as error:
            raise HTTPException(_status(error), re.sub(rf"\S*{re.escape(name)}", "the image", str(error))) from None
        except MemoryError:
            raise HTTPException(413, "the image takes more memory than this server has") from None
        except OSError as error:
            raise HTTPException(500, f"the server cannot keep the image while it works: {error.strerror}") from None


def _status(error: DeblurError) -> int:
    if isinstance(error, MemoryLimitError):
        return 413
    # ModelError: the loaded model has no variant for more than 8 bits.
    return 422 if isinstance(error, (InputError, ModelError)) else 500
