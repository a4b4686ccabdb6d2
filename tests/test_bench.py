"""deblur-bench on tiny real bundles and on candidates that fail in every way that candidates can."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from deblur_deploy.cli.bench import Arguments, command, parse, run
from deblur_deploy.errors import DeblurError, InputError, MissingFileError, ProviderError
from deblur_deploy.evaluation import views
from deblur_deploy.evaluation.bench import Entry, Plan, entries_of, measure_latency
from deblur_deploy.evaluation.compare import caveats, compare_records
from deblur_deploy.evaluation.quality import Pair, PairSet, psnr, ssim
from deblur_deploy.evaluation.record import Record, Row, new_record, read_record, to_csv, write_json
from deblur_deploy.evaluation.sets import measure, measure_quality, steps, usable_sets
from deblur_deploy.evaluation.worker import Worker
from deblur_deploy.media.images import read_image, write_image
from tests import tiny

PLAN = Plan(sizes=((48, 32),), budget_s=0.1, rounds=4)


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    images = [rng.integers(1, 255, (40, 50 + k, 3), np.uint8) for k in range(2)]
    return [Pair(name=f"{k}.png", blurred=image, sharp=255 - image) for k, image in enumerate(images)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("pairs")
    for pair in pairs:
        write_image(folder / "blur" / pair.name, pair.blurred)
        write_image(folder / "sharp" / pair.name, pair.sharp)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny.write_bundle(tmp_path_factory.mktemp("model") / "tiny")


def entry(function: str, variant: str = "", **arguments) -> Entry:
    return Entry(
        model="fake",
        variant=variant or function,
        provider="test",
        factory=f"tests.fakes:{function}",
        arguments=arguments,
    )


def test_a_worker_is_another_process_with_its_own_memory_and_variables():
    image = np.full((3, 4, 3), 7, np.uint8)
    with Worker("tests.fakes:hungry", {"megabytes": 300}) as hungry, Worker("tests.fakes:identity", {}) as modest:
        modest.keep(image)
        hungry.keep(image)
        assert modest.run().ms > 0
        hungry.run()
        if modest.peak_mb() is not None:
            assert hungry.peak_mb() - modest.peak_mb() == pytest.approx(300 * 2**20 / 1e6, rel=0.1)
        assert np.array_equal(modest.restore(image), image)
    with Worker("tests.fakes:identity", {}, environment={"FAKE": "yes"}) as worker:
        assert worker.facts == {"variable": "yes"}


def test_a_worker_imports_nothing_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "statistics.py").write_text("raise RuntimeError('somebody else, with the same name')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1]), *(place for place in sys.path if place)])
    with Worker("tests.fakes:identity", {}) as worker:
        assert worker.facts


def test_a_process_that_does_not_start_is_an_error_of_ours(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(ProviderError, match="its process does not start: No such file or directory"):
        Worker("tests.fakes:identity", {})


def test_a_worker_times_what_it_does():
    with Worker("tests.fakes:identity", {"milliseconds": 40}) as worker:
        worker.keep(np.zeros((2, 2, 3), np.uint8))
        assert worker.run().ms >= 40


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("tests.fakes:absent", "RuntimeError: no such library"),
        ("tests.fakes:missing", "missing"),
        ("no_such_module:f", "no_such_module"),
    ],
)
def test_a_candidate_that_cannot_be_made_says_why_in_one_line(factory, message):
    with pytest.raises(ProviderError, match=message) as caught:
        Worker(factory, {})
    assert "\n" not in str(caught.value)


def test_a_crash_is_an_error_of_its_own_candidate_with_its_last_words():
    with Worker("tests.fakes:crashing", {"after": 1}) as worker:
        worker.keep(np.zeros((2, 2, 3), np.uint8))
        worker.run()
        with pytest.raises(ProviderError, match="status 139: segmentation fault"):
            worker.run()


def test_a_candidate_that_hangs_is_given_up(monkeypatch):
    with Worker("tests.fakes:identity", {"milliseconds": 60_000}) as worker:
        worker.keep(np.zeros((2, 2, 3), np.uint8))
        monkeypatch.setattr("deblur_deploy.evaluation.worker.PATIENCE_S", 0.2)
        with pytest.raises(ProviderError, match=r"it gave no answer for 0\.2 s"):
            worker.run()


def test_whoever_fails_has_a_row_that_says_so_and_the_others_stand(pairs):
    entries = [
        entry("identity", "fp32"),
        entry("darker"),
        entry("absent"),
        entry("crashing", "in the middle", after=len(pairs) + 0),
        entry("crashing", "while timed", after=4),
    ]
    said: list[str] = []
    rounds: list[str] = []
    outcome = measure(entries, {"a": pairs}, pairs[0].blurred, PLAN, said.append, rounds.append)
    assert len(said) == steps(entries, {"a": pairs}, PLAN)
    assert rounds[0] == "48x32: round 1"
    rows = {row.variant: row for row in outcome.rows}
    assert list(rows) == [entry.variant for entry in entries]
    for name in ("fp32", "darker"):
        assert rows[name].error is None
        assert 0 < rows[name].best_ms <= rows[name].median_ms <= rows[name].p95_ms
        assert 3 <= rows[name].calls <= PLAN.rounds
    assert "no such library" in rows["absent"].error
    for name in ("in the middle", "while timed"):
        assert "segmentation fault" in rows[name].error
        assert rows[name].median_ms is None
    assert set(outcome.reference_ms) == {"48x32"}
    assert outcome.machine_noise == outcome.reference_noise


def test_quality_is_scikit_images_against_the_truth_and_against_fp32(pairs):
    rows = measure([entry("darker"), entry("identity", "fp32")], {"a": pairs}, pairs[0].blurred, PLAN).rows
    dark, same = rows
    assert same.psnr == pytest.approx(np.mean([psnr(pair.blurred, pair.sharp) for pair in pairs]))
    assert same.ssim == pytest.approx(np.mean([ssim(pair.blurred, pair.sharp) for pair in pairs]))
    assert same.psnr_blurred == same.psnr
    assert same.psnr_to_fp32 is None
    assert dark.psnr_to_fp32 == pytest.approx(20 * np.log10(255))
    assert (same.worst_drop_db, same.worst_image) == (None, None)
    lost = {
        pair.name: psnr(pair.blurred, pair.sharp) - psnr(np.maximum(pair.blurred, 1) - 1, pair.sharp) for pair in pairs
    }
    assert dark.worst_drop_db == pytest.approx(max(lost.values()))
    assert dark.worst_image == max(lost, key=lost.__getitem__)


def test_every_variant_runs_on_every_provider_and_its_receipt_is_kept(bundle, folder, tmp_path, capsys):
    out = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "html")}
    arguments = [str(bundle), "--data", str(folder), "--sizes", "48x32", "33x17", "--budget-s", "0.1"]
    arguments += ["--providers", "cpu", "directml", "--threads", "1"]
    status = command(arguments + [text for name, path in out.items() for text in (f"--{name}", str(path))])
    assert status == 1
    record = read_record(out["json"])
    assert len(record.rows) == 2 * 2 * 4
    for row in record.rows:
        if row.provider == "cpu":
            assert row.error is None
            receipt = row.facts["receipt"]
            assert (receipt["provider"], receipt["variant"], receipt["threads"]) == ("cpu", row.variant, 1)
            assert receipt["macs"] == {"cpu": 1.0}
            assert min(row.median_ms, row.load_ms, row.first_ms, row.psnr, row.frames_per_s) > 0
        else:
            assert "directml" in row.error
            assert row.median_ms is None
    assert record.settings["pairs"] == ["0.png", "1.png"]
    assert record.machine["cores"] >= 1
    assert "onnxruntime" in record.versions
    printed = capsys.readouterr()
    assert all(name in printed.out for name in ("fp32", "fp16", "int8", "float", "33x17", "failed"))
    assert "FAILED tiny/int8 on directml, 33x17, 48x32" in printed.err
    assert printed.err.count(f"- quality: {folder.name}\n") == 1  # a log hears of the set, not of every pair
    lines = list(csv.DictReader(out["csv"].read_text().splitlines()))
    assert [line["variant"] for line in lines] == [row.variant for row in record.rows]
    assert [line["median_ms"] for line in lines if line["error"]] == [""] * 8
    html = out["html"].read_text()
    assert html.count("data:image/jpeg;base64,") == 4
    assert html.count("<svg") == 2


def test_absent_providers_are_only_notes_unless_they_are_asked_for(bundle, folder, monkeypatch):
    from deblur_deploy.cli import bench

    def find(name):
        if name != "cpu":
            raise ProviderError(f"{name} is not installed")

    monkeypatch.setattr(bench, "find", find)
    notes: list[str] = []
    entries = bench._entries(Arguments(models=(bundle,)), notes)
    assert {entry.provider for entry in entries} == {"cpu"}
    assert notes == ["openvino skipped: openvino is not installed", "cuda skipped: cuda is not installed"]


def test_a_provider_that_does_not_exist_is_a_mistake(bundle):
    from deblur_deploy.cli import bench

    with pytest.raises(InputError, match="no provider is called 'cpux'"):
        bench._entries(Arguments(models=(bundle,), providers=("cpux",)), [])


def test_the_working_folder_is_a_model_with_a_name(bundle, monkeypatch):
    monkeypatch.chdir(bundle)
    assert {entry.model for entry in entries_of(Path(), ["cpu"])} == {bundle.name}
    assert {entry.model for entry in entries_of(Path("fp32.onnx"), ["cpu"])} == {bundle.name}


def test_a_single_file_is_a_model_too(bundle):
    [only] = entries_of(bundle / "int8.onnx", ["cpu"])
    assert (only.model, only.variant) == ("tiny", "int8")
    with pytest.raises(MissingFileError, match="no such model"):
        entries_of(bundle / "none.onnx", ["cpu"])
    with pytest.raises(InputError, match=r"no variant 'int4'; it has .*int8"):
        entries_of(bundle, ["cpu"], variants=["int4"])


@pytest.fixture(params=["flat", "nested", "csv"])
def mixed(request, folder, tmp_path):
    """Two good pairs, and four that cannot be used, each for another reason, in every layout that pairs may have."""
    root = tmp_path / "mixed"
    place = root if request.param == "flat" else root / "test" / "GOPR1"
    shutil.copytree(folder, place)
    for kind in ("blur", "sharp"):
        (place / kind / "broken.png").write_bytes(b"\x89PNG no")
        write_image(place / kind / "other.png", np.zeros((20, 20 if kind == "blur" else 30, 3), np.uint8))
        write_image(place / kind / "small.png", np.zeros((10, 30, 3), np.uint8))
    write_image(place / "blur" / "alone.png", np.zeros((20, 20, 3), np.uint8))
    if request.param != "csv":
        return root
    names = ["0", "1", "alone", "broken", "other", "small"]
    lines = [f"test/GOPR1/blur/{name}.png,test/GOPR1/sharp/{name}.png" for name in names]
    (root / "pairs.csv").write_text("\n".join(["blur,sharp", *lines]))
    return root / "pairs.csv"


def test_whatever_half_of_a_pair_is_wrong_is_one_line_and_the_others_are_measured(mixed, bundle, tmp_path, capsys):
    sets, failed = usable_sets([mixed])
    assert [pair.name for pair in sets[mixed.stem]] == ["0.png", "1.png"]
    assert [next(name for name in ("alone", "broken", "other", "small") if name in line) for line in failed] == [
        "alone", "broken", "other", "small",
    ]  # fmt: skip
    assert all("\n" not in line for line in failed)
    out = tmp_path / "out.json"
    arguments = ["--data", str(mixed), "--sizes", "16x16", "--variants", "int8", "--providers", "cpu"]
    assert command([str(bundle), *arguments, "--budget-s", "0.1", "--json", str(out)]) == 1
    printed = capsys.readouterr().err
    assert all(line in printed for line in failed)
    [row] = read_record(out).rows
    assert row.error is None
    assert row.psnr > 0


def test_training_refuses_the_pairs_that_a_benchmark_only_names(mixed):
    with pytest.raises(InputError, match="alone"):
        PairSet(mixed)


def test_nothing_to_compare_is_a_mistake(tmp_path):
    write_image(tmp_path / "blur" / "a.png", np.zeros((20, 20, 3), np.uint8))
    (tmp_path / "sharp").mkdir()
    with pytest.raises(InputError, match=r"no pair of .* can be used: .*a\.png has no partner"):
        usable_sets([tmp_path])
    with pytest.raises(InputError, match="no pairs in"):
        usable_sets([tmp_path / "sharp"])
    with pytest.raises(MissingFileError, match="nowhere"):
        usable_sets([tmp_path / "nowhere"])


def test_each_folder_of_pairs_is_a_set_with_rows_of_its_own(folder, bundle, tmp_path, capsys):
    easy = tmp_path / "easy"
    for name in ("0.png", "1.png"):
        image = read_image(folder / "sharp" / name)
        write_image(easy / "blur" / name, image)
        write_image(easy / "sharp" / name, image)
    out = tmp_path / "out.json"
    arguments = ["--sizes", "16x16", "--variants", "fp32", "int8", "--providers", "cpu", "--budget-s", "0.1"]
    assert command([str(bundle), "--data", str(folder), str(easy), *arguments, "--json", str(out)]) == 0
    record = read_record(out)
    rows = {(row.variant, row.data): row for row in record.rows}
    assert set(rows) == {(variant, data) for variant in ("fp32", "int8") for data in (folder.name, "easy")}
    for variant in ("fp32", "int8"):
        assert rows[variant, "easy"].psnr > rows[variant, folder.name].psnr + 5
        assert rows[variant, folder.name].median_ms > 0
        assert rows[variant, "easy"].median_ms is None
    assert record.settings["pairs"] == [f"{data}/{k}.png" for data in (folder.name, "easy") for k in range(2)]
    printed = capsys.readouterr()
    assert printed.out.count("easy") == 2
    assert "PSNR of the blurred images: 100.00 dB, mean of 2 pairs (easy)" in printed.err
    assert compare_records(record, record) == []
    lines = list(csv.DictReader(to_csv(record.rows).splitlines()))
    assert [line["data"] for line in lines] == [folder.name] * 2 + ["easy"] * 2


def test_memory_on_a_gpu_is_what_came_into_use_there(pairs, tmp_path, monkeypatch):
    tool, counter = tmp_path / "nvidia-smi", tmp_path / "count"
    # Each look finds 10 MiB more in use than the one before.
    tool.write_text(f"#!/bin/sh\necho x >> {counter}\necho $(( $(wc -l < {counter}) * 10 ))\necho 7\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    outcome = measure_latency([entry("identity"), entry("absent")], pairs[0].blurred, PLAN)
    assert [row.gpu_mb for row in outcome.rows] == [pytest.approx(10 * 2**20 / 1e6), None]
    columns, _ = views.cost_lines(outcome.rows)
    assert "GPU\nMB" in columns
    tool.write_text("#!/bin/sh\nexit 9\n")
    outcome = measure_latency([entry("identity")], pairs[0].blurred, PLAN)
    assert outcome.rows[0].gpu_mb is None
    assert "GPU\nMB" not in views.cost_lines(outcome.rows)[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sizes", "12"],
        ["--sizes", "0x5"],
        ["--sizes", "123456x2"],
        ["--budget-s", "0"],
        ["--budget-s", "nan"],
        ["--threads", "0"],
    ],
)
def test_bad_options_are_named_with_what_is_allowed(arguments):
    with pytest.raises(InputError, match=r"\bis .*allowed|has .*allowed"):
        parse(arguments)


def record(**changes) -> Record:
    rows = changes.pop("rows", None) or [row()]
    made = new_record("deblur-bench", {"pairs": ["a"], "threads": 2}, reference_ms={"48x32": 10.0}, rows=rows)
    return msgspec.structs.replace(made, **changes)


def row(**changes) -> Row:
    usual = {
        "median_ms": 100.0,
        "noise": 0.01,
        "steady_ms": changes.get("median_ms", 100.0),
        "psnr": 30.0,
        "ssim": 0.9,
        "peak_mb": 100.0,
    }
    return Row(**({"model": "m", "variant": "int8", "provider": "cpu", "size": "48x32"} | usual | changes))


@pytest.mark.parametrize(
    ("new", "worse", "better"),
    [
        (record(), 0, 0),
        (record(rows=[row(median_ms=104.9)]), 0, 0),  # within what two runs differ by
        (record(rows=[row(median_ms=106.0)]), 1, 0),
        (record(rows=[row(median_ms=94.0)]), 0, 1),
        (record(rows=[row(median_ms=106.0, steady_noise=0.07)]), 0, 0),  # within its own noise
        (record(rows=[row(median_ms=111.0)], reference_ms={"48x32": 11.2}), 0, 0),  # the machine is slower
        (record(rows=[row(median_ms=150.0, steady_ms=101.0)]), 0, 0),  # it only waited for others
        (record(rows=[row(steady_ms=107.0)]), 1, 0),
        (record(rows=[row(steady_ms=107.0, steady_noise=0.08)]), 0, 0),
        (record(rows=[row(psnr=29.98)]), 1, 0),
        (record(rows=[row(psnr=29.995)]), 0, 0),
        (record(rows=[row(psnr=20.0)], settings={"pairs": ["b"], "threads": 2}), 0, 0),  # other images
        (record(rows=[row(ssim=0.91, psnr=30.1)]), 0, 2),
        (record(rows=[row(peak_mb=120.0)]), 1, 0),
        (record(rows=[row(error="no memory")]), 1, 0),
        (record(rows=[row(variant="fp32")]), 1, 0),  # gone
        (record(rows=[row(model="renamed")]), 0, 0),
    ],
)
def test_the_guard_names_what_got_worse_beyond_the_noise(new, worse, better, tmp_path, capsys):
    changes = compare_records(record(), new)
    assert [change.worse for change in changes] == [True] * worse + [False] * better
    write_json(tmp_path / "old.json", record())
    write_json(tmp_path / "new.json", new)
    assert command(["--compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == (1 if worse else 0)
    assert f"{worse} figures worse, {better} better" in capsys.readouterr().out


def test_a_row_that_failed_before_cannot_get_worse():
    assert compare_records(record(rows=[row(error="no")]), record(rows=[row(variant="x")])) == []


def test_the_guard_says_why_two_records_may_not_be_comparable():
    other = record(machine={"processor": "other"}, settings={"pairs": [], "threads": 1}, reference_ms={"48x32": 20.0})
    text = " ".join(caveats(record(), other))
    assert all(word in text for word in ("machines differ", "pairs differ", "threads differ", "+100%"))
    assert caveats(record(), record()) == []


def test_records_come_back_as_they_were_but_for_the_seventh_digit(tmp_path):
    written = record(rows=[row(median_ms=1 / 3, psnr_to_fp32=None, facts={"threads": 2, "nodes": {"cpu": 1.0}})])
    write_json(tmp_path / "a.json", written)
    read = read_record(tmp_path / "a.json")
    assert read == msgspec.structs.replace(
        written, rows=[msgspec.structs.replace(written.rows[0], median_ms=0.333333, steady_ms=0.333333)]
    )
    assert len(to_csv(read.rows).splitlines()) == 2


def test_names_that_are_no_text_are_written_all_the_same(tmp_path):
    odd = os.fsdecode(b"caf\xe9.png")
    written = record(rows=[row(worst_image=odd)])
    write_json(tmp_path / "a.json", written)
    assert read_record(tmp_path / "a.json").rows[0].worst_image == "caf\\udce9.png"
    assert "caf\\udce9.png" in to_csv(written.rows).encode().decode()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 1, "surprise": 2}', "\xff"])
def test_what_is_no_record_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text, encoding="latin1")
    with pytest.raises(InputError, match="not a record"):
        read_record(tmp_path / "a.json")


def test_a_record_of_the_future_is_refused(tmp_path):
    data = json.loads(msgspec.json.encode(record()))
    (tmp_path / "a.json").write_text(json.dumps(data | {"schema": 99}))
    with pytest.raises(InputError, match="schema 99"):
        read_record(tmp_path / "a.json")


def test_two_models_of_one_name_are_refused(bundle):
    with pytest.raises(InputError, match="same name"):
        run(dataclasses.replace(Arguments(models=(bundle, bundle)), providers=("cpu",)), Console(quiet=True))


def test_waiting_for_others_is_said_below_the_table():
    text = "\n".join(views.summary(record(rows=[row(waited=0.5, steady_ms=60.0)], stolen=0.015)))
    assert "50.0% of the timed calls; taken by the host: 1.5%" in text
    assert "medians are 40% lower" in text
    assert "medians are" not in "\n".join(views.summary(record(rows=[row(waited=0.001)])))
    assert "waiting" not in "\n".join(views.summary(record()))


TWO = (row(model="small", median_ms=300.0, psnr=25.0), row())


@pytest.mark.parametrize(
    ("old", "new", "worse"),
    [
        (record(), record(rows=list(TWO)), []),  # another model came along
        (record(rows=list(TWO)), record(rows=[TWO[0]]), ["m int8 cpu 48x32: row"]),  # one is gone, none got faster
        (record(), record(rows=[row(load_ms=900.0, first_ms=900.0)]), []),  # nobody knows what it was
        (record(rows=[row(load_ms=90.0)]), record(rows=[row(load_ms=130.0)]), []),  # seen once, so it may vary
        (record(rows=[row(load_ms=90.0)]), record(rows=[row(load_ms=150.0)]), ["int8 cpu 48x32: load_ms"]),
        (record(rows=[row(psnr_to_fp32=52.0)]), record(rows=[row(psnr_to_fp32=50.5)]), ["int8 cpu: psnr_to_fp32"]),
        (record(rows=[row(worst_drop_db=0.01)]), record(rows=[row(worst_drop_db=0.3)]), ["int8 cpu: worst_drop_db"]),
        # The same quality at three sizes is one figure.
        (record(rows=[row(), row(size="9x9")]), record(rows=[row(psnr=29.0), row(size="9x9", psnr=29.0)]),
         ["int8 cpu: psnr"]),
        # A machine that got faster is no excuse for what got slower.
        (record(), record(rows=[row(median_ms=125.0)], reference_ms={"48x32": 7.0}), ["int8 cpu 48x32: steady_ms"]),
    ],
)  # fmt: skip
def test_the_guard_looks_at_every_figure_and_at_the_right_model(old, new, worse):
    assert [f"{change.row}: {change.what}" for change in compare_records(old, new)] == worse


def test_the_guard_notes_what_ran_in_another_precision():
    receipt = {"provider": "cpu", "effective_precision": "int8", "threads": 2}
    old, new = (
        record(rows=[row(facts={"receipt": receipt | {"effective_precision": precision}})])
        for precision in ("int8", "fp32")
    )
    assert caveats(old, new) == ["int8 cpu: ran on cpu in int8, 2 threads, now on cpu in fp32, 2 threads"]


def test_two_models_can_be_told_apart_in_tables_and_figures():
    made = record(
        rows=[made for size in ("48x32", "96x64") for made in (row(size=size), row(model="small", size=size))]
    )
    for table in views.tables(made):
        assert {line[table.columns.index("model")] for line in table.rows} == {"m", "small"}
    for figure in views.figures(made):
        assert "small int8, cpu" in figure.svg
    assert all("model" not in table.columns for table in views.tables(record()))


def test_only_what_computes_in_fp32_is_what_others_are_compared_with(pairs):
    coarse = {"effective_precision": "bf16"}
    entries = [entry("coarse", "fp32", receipt=coarse), entry("identity", "other")]
    assert [row.psnr_to_fp32 for row in measure_quality(entries, {"a": pairs})] == [None, None]
    entries += [dataclasses.replace(entry("identity", "fp32"), provider="exact")]
    coarse_row, other, exact = measure_quality(entries, {"a": pairs})
    assert coarse_row.psnr_to_fp32 == pytest.approx(20 * np.log10(255))
    assert (other.psnr_to_fp32, exact.psnr_to_fp32) == (100.0, None)


def test_a_broken_model_beside_a_good_one_takes_neither_table_nor_page(bundle, folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    for path in broken.glob("*.onnx"):
        path.write_bytes(path.read_bytes()[:99])
    page = tmp_path / "page.html"
    arguments = ["--data", str(folder), "--sizes", "48x32", "--variants", "int8", "--providers", "cpu"]
    assert command([str(bundle), str(broken), *arguments, "--budget-s", "0.1", "--html", str(page)]) == 1
    printed = capsys.readouterr()
    assert "FAILED broken/int8 on cpu, 48x32" in printed.err
    assert "tiny" in printed.out
    assert page.read_text().count("data:image/jpeg;base64,") == 4


def test_a_set_without_a_usable_pair_does_not_take_the_others_with_it(folder, tmp_path, capsys):
    (tmp_path / "empty" / "sharp").mkdir(parents=True)
    (tmp_path / "long.csv").write_text(f"{'a' * 300},b")
    sets, failed = usable_sets([folder, tmp_path / "empty", tmp_path / "long.csv"])
    assert list(sets) == [folder.name]
    assert [line.partition(":")[0].partition(";")[0] for line in failed] == [
        f"no pairs in {tmp_path / 'empty'}", f"no pair of {tmp_path / 'long.csv'} can be used",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["--json", "-", "--csv", "-"], "same name"),
        (["--html", "-"], "needs a file"),
        (["--json", "."], "is a folder"),
        (["--csv", "/proc/none/rows.csv"], "cannot write"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_measured(targets, said, monkeypatch):
    monkeypatch.setattr("deblur_deploy.cli.bench.measure", None)
    with pytest.raises(DeblurError, match=said):
        command(targets)


def test_an_image_too_large_for_this_machine_is_a_row_that_says_so(pairs, monkeypatch):
    def at_size(image, width, height):
        if width > 48:
            raise MemoryError
        return image

    monkeypatch.setattr("deblur_deploy.evaluation.bench.at_size", at_size)
    plan = dataclasses.replace(PLAN, sizes=((99999, 99999), (48, 32)))
    good, bad = measure_latency([entry("identity")], pairs[0].blurred, plan).rows
    assert good.error is None
    assert bad.error == "an image of 99999x99999 does not fit into memory"


def test_an_fp32_that_crashes_between_two_pairs_takes_nobody_with_it(pairs):
    crashed, stands = measure_quality([entry("crashing", "fp32", after=0), entry("darker")], {"a": pairs, "b": pairs})[
        2:
    ]
    assert "segmentation fault" in crashed.error
    assert stands.error is None
