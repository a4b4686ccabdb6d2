"""deblur-serve: the engine behind HTTP."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import uvicorn

from deblur_deploy.cli.arguments import parse_arguments
from deblur_deploy.cli.common import OK, guarded
from deblur_deploy.errors import InputError
from deblur_deploy.media.opencv import silence
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.variants import Wish
from deblur_deploy.serving.app import Limits, application


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Restore images over HTTP: POST one to /restore.

    /healthz says that it runs, /metrics how it does (Prometheus).  There is no password: to serve more than this
    machine, put a proxy before it that asks for one.
    """

    model: Path | None = None
    """Bundle folder, its name (such as hd-quarter) or .onnx file of deblur-export; by default the shipped hd."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network that this machine is in."""
    port: int = 8000
    """0 is any that is free."""
    provider: str = "auto"
    """auto, cpu, openvino, cuda, tensorrt or another execution provider; a named one runs or fails."""
    precision: Wish = "auto"
    """auto is the fastest within 0.1 dB of fp32."""
    threads: int | None = None
    """Cores to use; by default all that this process may use."""
    max_memory_mb: float | None = None
    """Larger images are cut into tiles; by default decided by the free memory."""
    max_megabytes: float = 32.0
    """Refuse larger bodies with 413."""
    max_megapixels: float = 64.0
    """Refuse images that state more pixels with 413."""
    queue: int = 16
    """Requests under way at most; one more is answered with 503."""

    def __post_init__(self) -> None:
        for name in ("max_megabytes", "max_megapixels"):
            value = getattr(self, name)
            if not (isfinite(value) and value > 0):
                raise ValueError(f"{name.replace('_', '-')} is {value}; allowed: more than 0 and finite")
        if self.queue < 1:
            raise ValueError(f"queue is {self.queue}; allowed: 1 or more")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; allowed: 0 to 65535")

    def limits(self) -> Limits:
        return Limits(
            max_bytes=int(self.max_megabytes * 1e6), max_pixels=int(self.max_megapixels * 1e6), queue=self.queue
        )


def listener(host: str, port: int) -> socket.socket:
    """A listening socket; raises InputError if the address is not ours or taken."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from None


def parse(argv: Sequence[str] | None) -> ServeConfig:
    """What the command line asks for; raises InputError on a mistake."""
    return parse_arguments(ServeConfig, "deblur-serve", argv)


def command(argv: Sequence[str] | None) -> int:
    """Parse and serve until Ctrl-C or SIGTERM; what is under way is finished."""
    config = parse(argv)
    silence()
    # Before the model, which takes longer to load than a taken port to be noticed.
    with listener(config.host, config.port) as listening:
        engine = DeblurEngine(
            config.model, config.provider, config.precision, threads=config.threads, max_memory_mb=config.max_memory_mb
        )
        with engine:
            port = listening.getsockname()[1]
            host = f"[{config.host}]" if ":" in config.host else config.host
            sys.stderr.write(f"{engine.receipt}\nlistening on http://{host}:{port}/restore\n")
            server = uvicorn.Server(
                uvicorn.Config(
                    application(engine, config.limits()),
                    log_level="warning",
                    access_log=False,
                    timeout_graceful_shutdown=30,
                )
            )
            # The usual way to end it.
            with suppress(KeyboardInterrupt):
                server.run(sockets=[listening])
    return OK


main = guarded("deblur-serve", command)

if __name__ == "__main__":
    sys.exit(main())
