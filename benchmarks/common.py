"""What the benchmark scripts share: their options, their candidates, and where their records go."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from deblur_deploy.bundles.manifest import Bundle
from deblur_deploy.bundles.names import located
from deblur_deploy.cli.common import OK, SOME_FAILED, guarded
from deblur_deploy.errors import DeblurError
from deblur_deploy.evaluation.bench import Entry, Progress, entries_of
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.evaluation.record import Record, Row, write_json
from deblur_deploy.pipeline.photos import builtin_pairs
from deblur_deploy.runtime.providers import find
from deblur_deploy.shipped import DEFAULT_BUNDLE
from deblur_deploy.system.threads import usable_cores

RESULTS = Path(__file__).parent / "results"
PROVIDERS = ("cpu", "openvino", "cuda")
BUILTIN = "built-in photographs"
_SIZE = re.compile(r"[1-9]\d{0,4}x[1-9]\d{0,4}")


def files_of(model: Path) -> dict[str, str]:
    """SHA-256 of each variant's file in a bundle, as its manifest has them."""
    return {name: variant.sha256 for name, variant in Bundle.read(model).variants.items()}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every script can be told."""

    model: Path = DEFAULT_BUNDLE
    """Bundle of deblur-export, or its name."""
    threads: int = usable_cores()
    """Cores to use, the same for every candidate."""
    out: Path = RESULTS
    """Folder for the record."""
    quick: bool = False
    """Fewer and shorter measurements: to see that everything works."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", located(self.model))
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; allowed: 1 or more")

    def settings(self, **more: Any) -> dict[str, Any]:
        """The options as a record keeps them."""
        return {
            "model": self.model.name,
            "files": files_of(self.model),
            "threads": self.threads,
            "quick": self.quick,
            **more,
        }


@dataclass(frozen=True, kw_only=True)
class Chosen(Options):
    """What scripts can be told that measure every variant on every provider."""

    providers: tuple[str, ...] = PROVIDERS
    """Those of them that are present."""
    variants: tuple[str, ...] = ()
    """Files of the bundle, such as 'int8'; by default all."""

    def settings(self, **more: Any) -> dict[str, Any]:
        """The options as a record keeps them."""
        return super().settings(providers=list(self.providers), variants=list(self.variants), **more)


@dataclass(frozen=True, kw_only=True)
class Sized(Chosen):
    """What they can be told where it is about time."""

    sizes: tuple[str, ...] = ()
    """WIDTHxHEIGHT of the images that are timed; by default the script's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in self.sizes:
            if not _SIZE.fullmatch(size):
                raise ValueError(f"sizes has {size!r}; allowed: WIDTHxHEIGHT such as 1280x720")

    def sizes_or(self, usual: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        """Width and height of each size."""
        asked = [(int(width), int(height)) for width, height in (size.split("x") for size in self.sizes)]
        return tuple(asked or usual)


def text_of(sizes: Iterable[tuple[int, int]]) -> list[str]:
    """Sizes as rows and records name them."""
    return [f"{width}x{height}" for width, height in sizes]


def present(names: Iterable[str], notes: list[str]) -> list[str]:
    """Those of the providers that are on this machine; why the others are not goes to ``notes``."""
    found = []
    for name in names:
        try:
            find(name)
            found.append(name)
        except DeblurError as error:
            notes.append(f"{name} skipped: {error}")
    return found


def product(options: Chosen, notes: list[str]) -> list[Entry]:
    """The bundle's variants on every provider of this machine, or those that were asked for."""
    providers = present(options.providers, notes)
    return entries_of(options.model, providers, variants=options.variants, threads=options.threads)


def pairs(options: Options) -> list[Pair]:
    """The built-in pairs, or three of them."""
    found = builtin_pairs()
    return found[::3] if options.quick else found


def progress() -> Progress:
    """Says on standard error what is being measured."""
    console = Console(stderr=True)

    return lambda what: console.print(f"- {what}", highlight=False, markup=False, soft_wrap=True)


def save(record: Record, options: Options, lost: Sequence[str] = ()) -> int:
    """Write the record to ``NAME.json``; answers the exit status, 1 if a row failed or an image was ``lost``."""
    path = options.out / f"{record.benchmark}.json"
    write_json(path, record)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    for note in record.notes:
        console.print(f"note: {note}")
    failed: list[Row] = [row for row in record.rows if row.error]
    for row in failed:
        console.print(f"FAILED {' '.join(row.key)}: {row.error}")
    console.print(f"written: {path}")
    return SOME_FAILED if failed or lost else OK


def script(options: type[Any], run: Callable[[Any], int]) -> None:
    """Parse the command line, run, and exit with the status."""
    name = Path(sys.argv[0]).name

    def command(argv: Sequence[str] | None) -> int:
        return run(tyro.cli(options, prog=name, args=argv))

    sys.exit(guarded(name, command)())
