"""What damaged files and sudden ends do: thousands of mutations of each kind, and hundreds of kills of each command.

A mutation may be accepted (a flipped bit in a pixel is still an image) or refused with a DeblurError of one line.
Anything else is a failure: another exception, a crash of the process, half a file, or more than 20 seconds.  The work
is done in a child process that names each mutation before it tries it, so that a crash is counted and the rest goes on.
How commands are killed, and what must then hold, is in ``kills.py``.

    python -m benchmarks.robustness --count 10000 --kills 200

What came of it is kept as a record; with --kind or --command only that part of it is replaced.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.kills import COMMANDS, kill
from benchmarks.mutations import KINDS, attempt, seeds

LIMIT_S = 20.0


def work(kind: str, first: int, last: int) -> None:
    """The child: one line before and one after each mutation."""
    with tempfile.TemporaryDirectory() as name:
        files = seeds(kind, Path(name))
        for seed in range(first, last):
            print(json.dumps([seed]), flush=True)
            print(json.dumps([seed, attempt(kind, files, seed)]), flush=True)


def sweep(kind: str, count: int, first: int = 0) -> tuple[Counter[str], list[tuple[int, str]]]:
    """What came of ``count`` mutations, and the failures by seed."""
    outcomes: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    seed, last = first, first + count
    while seed < last:
        command = [sys.executable, __file__, "--child", kind, str(seed), str(last)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        lines: Queue[str] = Queue()
        reader = Thread(target=lambda c=child, q=lines: [q.put(line) for line in c.stdout] + [q.put("")], daemon=True)
        reader.start()
        trying, problem = seed, ""
        while True:
            try:
                line = lines.get(timeout=LIMIT_S + (40 if trying == seed else 0))
            except Empty:
                child.kill()
                problem = f"FAILED: no answer in {LIMIT_S:.0f} s"
                break
            if not line:
                code = child.wait()
                problem = f"FAILED: the process ended with {code}" if code else ""
                break
            trying, *answer = json.loads(line)
            if answer:
                outcomes[answer[0].split(":")[0]] += 1
                if answer[0].startswith("FAILED"):
                    failures.append((trying, answer[0]))
        child.wait()
        reader.join()
        child.stdout.close()
        if problem:
            outcomes["FAILED"] += 1
            failures.append((trying, problem))
        seed = trying + 1
    return outcomes, failures


def keep(path: Path, settings: dict[str, Any], found: dict[str, Any]) -> None:
    """Write the record; parts that were not tried now stay from the record that is there, each with its own date."""
    import msgspec

    from deblur_deploy.evaluation.record import new_record, read_record, write_json

    record = new_record("robustness", settings)
    before = read_record(path).found if path.exists() else {}
    mine = {name: {**part, "date": record.date, "commit": record.commit} for name, part in found.items()}
    write_json(path, msgspec.structs.replace(record, found={**before, **mine}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10000, help="mutations of each kind")
    parser.add_argument("--kills", type=int, default=200, help="kills of each command")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind of file (may be repeated)")
    parser.add_argument("--command", choices=COMMANDS, action="append", help="only this command (may be repeated)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the record")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, first, last = arguments.child
        work(kind, int(first), int(last))
        return 0
    everything = not arguments.kind and not arguments.command
    settings = {"count": arguments.count, "kills": arguments.kills, "first": arguments.first, "limit_s": LIMIT_S}
    failed = 0
    for kind in arguments.kind or (KINDS if everything else ()):
        outcomes, failures = sweep(kind, arguments.count, arguments.first)
        keep(arguments.out / "robustness.json", settings, {kind: {**outcomes, "failures": failures}})
        print(kind, dict(outcomes.most_common()), flush=True)
        for seed, problem in failures[:20]:
            print(f"  seed {seed}: {problem}")
        failed += len(failures)
    for command in arguments.command or (COMMANDS if everything else ()):
        result = kill(command, arguments.kills, arguments.first)
        keep(arguments.out / "robustness.json", settings, {f"kill {command}": result.record()})
        print(f"kill {command}", result.record(), flush=True)
        failed += len(result.failures)
    print(json.dumps({"failures": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
