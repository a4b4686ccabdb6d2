"""Tables of the engine at other people's service: behind HTTP under load, and on a cluster beside the plain command."""

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


TABLES = {"serving": serving_table, "cluster": cluster_table}
"""By the benchmark's name."""
