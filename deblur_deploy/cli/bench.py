"""deblur-bench: which variant on which provider, in one table; and whether anything got worse since."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, zip_longest
from pathlib import Path
from typing import Annotated

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deblur_deploy.cli import tune
from deblur_deploy.cli.arguments import parse_arguments
from deblur_deploy.cli.common import OK, SOME_FAILED, guarded
from deblur_deploy.errors import DeblurError, InputError, MissingExtraError, ProviderError
from deblur_deploy.evaluation import bench, record, views
from deblur_deploy.evaluation.compare import caveats, compare_records, matched
from deblur_deploy.evaluation.page import Page, pictures_of, write_page
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.evaluation.sets import measure, names, steps, usable_sets
from deblur_deploy.files import refuse_unwritable, writing_file
from deblur_deploy.runtime.providers import AUTO, find
from deblur_deploy.shipped import DEFAULT_BUNDLE
from deblur_deploy.system.threads import usable_cores

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure latency, memory and quality of every variant on every provider and size, or compare two such records.

    Exit status 1 means that a row failed, or that something got worse beyond the noise.
    """

    models: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Bundle folders, their names (such as hd-quarter) or .onnx files of deblur-export; by default the shipped hd."""
    providers: tuple[str, ...] = ()
    """cpu, openvino, cuda, ...; by default all of these that are present."""
    variants: tuple[str, ...] = ()
    """Only these files of the bundles, such as 'int8'; by default all."""
    sizes: tuple[str, ...] = tuple(f"{width}x{height}" for width, height in bench.Plan().sizes)
    """WIDTHxHEIGHT of the images that are timed."""
    data: tuple[Path, ...] = ()
    """Image pairs for PSNR and SSIM, each a set of its own: folders with blur/NAME and sharp/NAME, in any depth, or CSV
    files; by default the built-in photographs."""
    threads: int | None = None
    """Cores to use; by default all that this process may use."""
    budget_s: float = bench.Plan().budget_s
    """Seconds of timed calls, all sizes together; every row is timed at least three times nevertheless."""
    json: Path | None = None
    """Write the record to this file; '-' is standard output."""
    csv: Path | None = None
    """Write the rows to this file; '-' is standard output."""
    html: Path | None = None
    """Write one self-contained page to this file."""
    compare: tuple[Path, Path] | None = None
    """Measure nothing; say what got slower or worse from the first of these records (--json) to the second."""
    tune: bool = False
    """Find out which file, provider, threads, shapes and tiles are fastest here, and keep that for DeblurEngine; of
    the other options only --providers and --budget-s count."""

    def __post_init__(self) -> None:
        for size in self.sizes:
            if not _SIZE.fullmatch(size):
                raise ValueError(f"sizes has {size!r}; allowed: WIDTHxHEIGHT such as 1280x720, each up to 99999")
        if not self.sizes:
            raise ValueError("sizes is empty; allowed: one or more of WIDTHxHEIGHT")
        if not 0 < self.budget_s <= 86400:
            raise ValueError(f"budget-s is {self.budget_s}; allowed: more than 0, up to 86400")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; allowed: 1 or more")


USUAL = {Arguments: ("models", "providers", "variants", "sizes", "data", "json", "html", "compare", "tune")}


def parse(argv: Sequence[str] | None) -> Arguments:
    """Arguments of the command line; raises InputError on a mistake."""
    return parse_arguments(Arguments, "deblur-bench", argv, usual=USUAL)


def run(arguments: Arguments, console: Console | None = None) -> int:
    """Measure or compare; returns the exit status."""
    console = console or Console(stderr=True)
    if arguments.compare:
        return _compare(*arguments.compare)
    if arguments.tune:
        return tune.run(arguments.models, providers=arguments.providers, budget_s=arguments.budget_s, console=console)
    _check_targets(arguments)
    start = time.monotonic()
    notes: list[str] = []
    entries = _entries(arguments, notes)
    sets, failed = _sets(arguments.data)
    outcome = _measured(arguments, entries, sets, console)
    result = record.new_record(
        "deblur-bench",
        {
            "sizes": list(arguments.sizes),
            "threads": arguments.threads or usable_cores(),
            "budget_s": arguments.budget_s,
            "data": ", ".join(sets),
            "sets": {name: len(pairs) for name, pairs in sets.items()},
            "pairs": names(sets),
        },
        reference_ms=outcome.reference_ms,
        machine_noise=outcome.machine_noise,
        stolen=outcome.stolen,
        notes=[*notes, *failed],
        found={"seconds": round(time.monotonic() - start, 1)},
        rows=outcome.rows,
    )
    # People first: whatever happens to a file, they have seen what was measured.
    if Path("-") not in (arguments.json, arguments.csv):
        for grid in tables(result):
            Console(width=None if sys.stdout.isatty() else 120).print(grid)
    for line in views.summary(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    _write(arguments, result)
    if arguments.html:
        _write_html(arguments.html, result, entries, next(iter(sets.values())))
    return SOME_FAILED if failed or any(row.error for row in result.rows) else OK


def _measured(
    arguments: Arguments, entries: Sequence[bench.Entry], sets: Mapping[str, Sequence[Pair]], console: Console
) -> bench.Outcome:
    """Measure, and show meanwhile what is being done."""
    sizes = tuple(dict.fromkeys(_width_height(size) for size in arguments.sizes))
    plan, done, said = bench.Plan(sizes=sizes, budget_s=arguments.budget_s), count(), ""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=steps(entries, sets, plan))

        def on_progress(what: str) -> None:
            nonlocal said
            # What is being done is not done yet.
            progress.update(task, completed=next(done), description=escape(what))
            # A log has no bar; it is told what begins, but not of every pair.
            if not console.is_terminal and (phase := what.partition(",")[0]) != said:
                console.print(f"- {phase}", highlight=False, markup=False, soft_wrap=True)
                said = phase

        def on_round(what: str) -> None:
            progress.update(task, description=escape(what))

        photo = next(iter(sets.values()))[0].blurred
        return measure(entries, sets, photo, plan, on_progress, on_round)


def tables(result: record.Record) -> list[Table]:
    """One line a row, the sizes apart; and one line a variant and provider."""
    grids = []
    timed, variants = [row for row in result.rows if row.size], views.one_a_variant(result.rows)
    for (columns, lines), rows in (
        (views.cost_lines(result.rows), timed),
        (views.quality_lines(result.rows), variants),
    ):
        grid = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
        for heading in columns:
            textual = heading in ("model", "variant", "provider", "size", "on", "really ran")
            grid.add_column(heading, justify="left" if textual else "right", no_wrap=heading != "really ran")
        for row, after, line in zip_longest(rows, rows[1:], lines):
            last = after is None or (after.size, after.data) != (row.size, row.data)
            grid.add_row(*map(escape, line), end_section=last)
        grids.append(grid)
    return grids


def _width_height(size: str) -> tuple[int, int]:
    width, height = map(int, size.split("x"))
    return width, height


def _entries(arguments: Arguments, notes: list[str]) -> list[bench.Entry]:
    models = arguments.models or (DEFAULT_BUNDLE,)
    providers = list(arguments.providers)
    for name in providers:
        with suppress(ProviderError):  # of one that is absent a row says so; one that does not exist is a mistake
            find(name)
    if not providers:
        # Named providers must run; of the usual ones those that are absent are only mentioned.
        for name in reversed(AUTO):
            try:
                find(name)
                providers.append(name)
            except DeblurError as error:
                notes.append(f"{name} skipped: {error}")
    entries = [
        entry
        for model in models
        for entry in bench.entries_of(model, providers, variants=arguments.variants, threads=arguments.threads)
    ]
    if len({entry.name for entry in entries}) < len(entries):
        raise InputError("two of the models or providers have the same name; rename one of the folders")
    return entries


def _sets(data: Sequence[Path]) -> tuple[dict[str, Sequence[Pair]], list[str]]:
    """Pairs by the name of their set, and one line for each that cannot be used."""
    if data:
        return usable_sets(data)
    try:
        from deblur_deploy.pipeline.photos import builtin_pairs
    except ImportError as error:
        raise MissingExtraError(
            f"{error.name} is not installed, which the built-in photographs need; give --data, or "
            "pip install 'deblur-deploy[cpu,train]'"
        ) from None
    return {"built-in photographs": builtin_pairs()}, []


def _check_targets(arguments: Arguments) -> None:
    """Raises InputError or OutputError now for what could not be written in the end, minutes later."""
    paths = [path for path in (arguments.json, arguments.csv, arguments.html) if path is not None]
    if len(set(paths)) < len(paths):
        raise InputError("two of --json, --csv and --html have the same name; give each a file of its own")
    if arguments.html == Path("-"):
        raise InputError("--html is '-'; a page with pictures needs a file")
    for path in paths:
        if path != Path("-"):
            refuse_unwritable(path)


def _write(arguments: Arguments, result: record.Record) -> None:
    texts = ((arguments.json, record.to_json(result).decode()), (arguments.csv, record.to_csv(result.rows)))
    for path, text in texts:
        if path == Path("-"):
            sys.stdout.write(text)
        elif path is not None:
            with writing_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")


def _write_html(path: Path, result: record.Record, entries: Sequence[bench.Entry], pairs: Sequence[Pair]) -> None:
    # The pictures are those of what was fastest, per pixel.
    ran = [row for row in result.rows if row.error is None and row.median_ms]
    fastest = max(ran, key=lambda row: row.megapixels_per_s or 0, default=None)
    shown = next((e for e in entries if fastest and (e.model, e.variant, e.provider) == fastest.key[:3]), None)
    pictures, notes = [], views.summary(result)
    if shown is not None:
        try:
            with shown.start() as worker:
                pictures = pictures_of(pairs, worker.restore)
        except DeblurError as error:
            notes.append(f"no pictures: {error}")
    page = Page(
        title="deblur-bench",
        lead="; ".join(notes[:2]),
        pictures=pictures,
        shown=shown.name if shown else "",
        figures=views.figures(result),
        tables=views.tables(result),
        notes=[*notes[2:], ", ".join(f"{name} {of}" for name, of in result.versions.items())],
    )
    write_page(path, page)


def _compare(old_path: Path, new_path: Path) -> int:
    old, new = record.read_record(old_path), record.read_record(new_path)
    out = Console(soft_wrap=True, highlight=False, markup=False)
    for line in caveats(old, new):
        out.print(f"note: {line}")
    changes = compare_records(old, new)
    for change in changes:
        out.print(f"{'WORSE ' if change.worse else 'better'} {change.row}: {change.what} {change.text}")
    worse = sum(change.worse for change in changes)
    compared = sum(after is not None for _, _, after in matched(old, new))
    out.print(f"{compared} rows compared, {worse} figures worse, {len(changes) - worse} better, beyond the noise")
    return SOME_FAILED if worse else OK


def command(argv: Sequence[str] | None) -> int:
    """Parse and run."""
    return run(parse(argv))


main = guarded("deblur-bench", command)

if __name__ == "__main__":
    sys.exit(main())
