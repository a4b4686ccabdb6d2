"""Tables of the engine at work: under load, on a cluster, over a long time, and with what is damaged."""

from __future__ import annotations

from deblur_deploy.evaluation.page import Table
from deblur_deploy.evaluation.record import Record
from deblur_deploy.evaluation.views import digits


def serving_table(record: Record) -> Table:
    """Latency and throughput of ``deblur-serve`` at several requests at once, and every answer that came."""
    lines = []
    for row in record.rows:
        answers = ", ".join(f"{count} x {status}" for status, count in sorted(row.facts["statuses"].items()))
        times = [digits(row.median_ms), digits(row.p95_ms), digits(row.facts["per_second"])]
        lines.append([row.variant, *(times if row.error is None else [f"failed: {row.error}", "", ""]), answers])
    note = "JPEG in and out; 200 is an image, 503 says that the queue is full. One image at a time without a server, "
    note += f"decoded, restored and encoded: {digits(record.found['without_a_server_ms'])} ms."
    columns = ["requests", "median, ms", "95th percentile, ms", "images a second", "answers"]
    return Table(heading=f"deblur-serve under load, {record.rows[0].size}", columns=columns, rows=lines, note=note)


def cluster_table(record: Record) -> Table:
    """``deblur-run --ray`` beside plain ``deblur-run``, start and end included; the line about many is arithmetic."""
    lines = [
        [
            row.variant,
            digits(row.median_ms),
            *(digits(row.facts.get(name)) for name in ("seconds", "first", "last")),
        ]
        for row in record.rows
    ]
    paper = record.found["paper_not_measured"]
    note = f"{record.settings['images']} photographs ({record.settings['photos']}). One machine hands out at most "
    note += (
        f"{digits(record.found['outcomes_per_s'])} outcomes a second. By arithmetic from these rates, not measured: "
    )
    note += f"{paper['machines']} such machines would do {digits(paper['images_per_s'])} images a second."
    columns = ["how", "ms an image", "seconds in all", "first done after, s", "last done after, s"]
    return Table(heading="deblur-run --ray on one machine", columns=columns, rows=lines, note=note)


def robustness_table(record: Record) -> Table:
    """What came of damaged files, a line a kind, and of commands that were killed, a line a command."""
    lines = []
    for name, found in record.found.items():
        failures = len(found["failures"])
        if name.startswith("kill "):
            done = f"{found['left alone']} runs that were then left alone ended whole"
            lines.append([f"deblur-{name.removeprefix('kill ')}, killed", f"{found['killed']:,}", done, str(failures)])
            continue
        refused = sorted((count, error) for error, count in found.items() if error.endswith("Error"))
        came = [f"{found['accepted']:,} opened", *(f"{count:,} {error}" for count, error in reversed(refused))]
        tried = sum(value for value in found.values() if isinstance(value, int))
        lines.append([f"{name}, damaged", f"{tried:,}", ", ".join(came), str(failures)])
    dates = {found["date"][:10] for found in record.found.values() if "date" in found}
    note = f"Tried between {min(dates)} and {max(dates)}. " if len(dates) > 1 else ""
    note += "A failure is a crash, a hang of 20 seconds, an error of more than one line, half a file or a silent loss; "
    note += "commands are killed with -9 at random moments, and what has a name of its own is then looked at."
    return Table(heading="Damaged files and kills", columns=["what", "times", "", "failures"], rows=lines, note=note)


def soak_table(record: Record) -> Table:
    """Memory of one process over a long time, while it works and with all engines closed."""
    found, minutes = record.found, record.settings["minutes"]
    kinds = {"while it works": "running", "all engines closed": "closed"}
    lines = [[name, *(digits(value) for value in found[f"{key}_mb"])] for name, key in kinds.items()]
    note = f"{record.settings['workers']} threads: {found['called']:,} single images and {found['streamed']:,} in "
    note += f"streams, of {record.settings['sizes']} sizes and six forms; {found['engines opened']:,} engines opened "
    note += f"and closed; wrong results: {found.get('wrong results', 0)}."
    columns = ["memory of the process, MB", f"after {minutes / 10:g} minutes", f"after {minutes:g}"]
    return Table(heading="A long time in one process", columns=columns, rows=lines, note=note)


TABLES = {
    "serving": serving_table, "cluster": cluster_table, "robustness": robustness_table, "soak": soak_table,
}  # fmt: skip
"""By the benchmark's name."""
