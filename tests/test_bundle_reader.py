from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deblur_deploy.bundles.manifest import MANIFEST, Bundle
from deblur_deploy.contract import KEY, ModelContract
from deblur_deploy.errors import DeblurError, MissingFileError, ModelError
from deblur_deploy.runtime import providers
from deblur_deploy.runtime.variants import choose_variant, float_variant, within_budget
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_bundle(tmp_path / "b")


def edit(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(data | changes))


def test_reads_what_was_written(folder: Path) -> None:
    bundle = Bundle.read(folder)
    assert sorted(bundle.variants) == ["float", "fp16", "fp32", "int8"]
    assert bundle.variants["int8"].latency_ms == {"cpu": 1.0}
    assert float_variant(bundle).io == "float32"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": 2}, "schema 2"),
        ({"variants": []}, "no variants"),
        ({"variants": [{"name": "x"}]}, "damaged"),
        ({"variants": None}, "damaged"),
        ({"variants": [{"name": "x", "file": "../b/fp32.onnx"}]}, "inside the bundle"),
        ({"variants": [{"name": "x", "file": "/etc/passwd"}]}, "inside the bundle"),
        ({"variants": [{"name": "x", "file": ".."}]}, "lacks"),
        ({"variants": [{"name": "x", "file": "absent.onnx"}]}, r"lacks absent\.onnx"),
    ],
)
def test_damage_is_named(folder: Path, changes: dict[str, Any], says: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ModelError, match=says) as caught:
        Bundle.read(folder)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mutation_reads_or_is_our_error(folder: Path, data: st.DataObject) -> None:
    original = tiny.write_bundle(folder.parent / "c") if not (folder.parent / "c").exists() else folder.parent / "c"
    content = bytearray((original / MANIFEST).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    (folder / MANIFEST).write_bytes(content)
    with suppress(DeblurError):
        assert Bundle.read(folder).variants


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        Bundle.read(tmp_path)
    with pytest.raises(MissingFileError):
        Bundle.read(tmp_path / "absent")


def test_choice_obeys_quality_then_speed_then_habit(folder: Path) -> None:
    cpu = providers.find("cpu")
    rows = json.loads((folder / MANIFEST).read_text())["variants"]

    def choice(precision: str = "auto", **changes: dict[str, Any]) -> str:
        edit(folder, variants=[row | changes.get(row["name"], {}) for row in rows])
        return choose_variant(Bundle.read(folder), cpu, precision).name

    assert choice() == "int8"
    assert choice(int8={"drop_db": 0.2}) == "fp16"
    assert choice(fp16={"latency_ms": {"cpu": 0.5}}) == "fp16"
    assert choice(fp32={"latency_ms": {}}) == "int8"
    assert choice(int8={"slower_than_fp32_on": ["cuda"]}) == "int8"
    assert choice(int8={"slower_than_fp32_on": ["cpu"], "latency_ms": {}}) == "fp16"
    assert choice("int8", int8={"slower_than_fp32_on": ["cpu"]}) == "int8"
    assert choice("fp32") == "fp32"
    assert choice("bf16") == "fp32"


def test_files_arranged_for_the_cpu_run_nowhere_else_however_fast(folder: Path) -> None:
    rows = json.loads((folder / MANIFEST).read_text())["variants"]
    int8 = next(row for row in rows if row["name"] == "int8")
    fast = {"latency_ms": {"openvino": 1.0}}
    others = [row | {"latency_ms": {"openvino": 2.0}} for row in rows if row is not int8]
    edit(folder, variants=[int8 | fast | {"layout": "rows"}, *others, int8 | {"name": "int8-planes", **fast}])
    bundle, openvino = Bundle.read(folder), providers.Provider(name="openvino", ort_name="", device="")
    assert choose_variant(bundle, openvino, "auto").name == "int8-planes"
    assert {v.name for v in within_budget(bundle, openvino)} == {"fp32", "fp16", "int8-planes"}
    assert "int8" in {v.name for v in within_budget(bundle, providers.find("cpu"))}


@pytest.mark.parametrize(
    ("provider", "recorded", "counts"),
    [
        ({"name": "openvino", "kind": "GPU"}, "openvino:gpu", True),
        ({"name": "openvino", "kind": "GPU"}, "openvino", False),
        ({"name": "openvino", "kind": "CPU"}, "openvino:cpu", True),
        ({"name": "openvino", "kind": "CPU"}, "openvino", True),
        ({"name": "cuda", "kind": "GPU", "device_id": 1}, "cuda:1", True),
        ({"name": "cuda", "kind": "GPU", "device_id": 1}, "cuda:0", False),
        ({"name": "cuda", "kind": "GPU", "device_id": 1}, "cuda", True),
    ],
)
def test_what_was_measured_on_a_device_counts_there(
    provider: dict[str, Any], recorded: str, counts: bool, folder: Path
) -> None:
    rows = json.loads((folder / MANIFEST).read_text())["variants"]
    here = providers.Provider(ort_name="", device="", **provider)
    usual = choose_variant(Bundle.read(folder), here, "auto").name
    times = {"fp32": 2.0, "fp16": 2.0, "int8": 2.0, usual: 3.0}
    edit(folder, variants=[row | {"latency_ms": {recorded: times.get(row["name"], 9.0)}} for row in rows])
    assert (choose_variant(Bundle.read(folder), here, "auto").name != usual) is counts
    slower = [row | ({"slower_than_fp32_on": [recorded]} if row["name"] == usual else {}) for row in rows]
    edit(folder, variants=slower)
    assert (choose_variant(Bundle.read(folder), here, "auto").name != usual) is counts


def test_without_the_variant_it_says_what_there_is(folder: Path) -> None:
    rows = json.loads((folder / MANIFEST).read_text())["variants"]
    edit(folder, variants=[row for row in rows if row["name"] == "fp32"])
    bundle = Bundle.read(folder)
    with pytest.raises(ModelError, match="no int8 variant; it has fp32"):
        choose_variant(bundle, providers.find("cpu"), "int8")
    with pytest.raises(ModelError, match="no float variant"):
        float_variant(bundle)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"io": "uint8"', '"io": "uint9"'),
        ('"precision": "fp32"', '"precision": []'),
        ('"drop_db": 0.0', '"drop_db": 1' + "0" * 400),
        ('"drop_db": 0.0', '"drop_db": 1' + "0" * 5000),
        ('"drop_db": 0.0', '"drop_db": NaN'),
        ('"drop_db": 0.0', '"drop_db": ' + "[" * 100_000),
    ],
)
def test_values_that_make_no_sense_are_damage(folder: Path, old: str, new: str) -> None:
    text = (folder / MANIFEST).read_text()
    assert old in text
    (folder / MANIFEST).write_text(text.replace(old, new, 1))
    with pytest.raises(ModelError, match="is damaged"):
        Bundle.read(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": 1' + "0" * 5000 + "}"])
def test_a_contract_that_cannot_be_parsed_is_damage(text: str) -> None:
    with pytest.raises(ModelError, match="damaged"):
        ModelContract.from_metadata({KEY: text}, "m.onnx")
