"""deblur-export: a checkpoint becomes a bundle, and mistakes become one line."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import msgspec
import numpy as np
import onnx
import pytest
from safetensors.torch import save_file

from deblur_deploy import DeblurEngine
from deblur_deploy.bundles.manifest import Bundle
from deblur_deploy.cli.common import guarded
from deblur_deploy.cli.export import command
from deblur_deploy.contract import ModelContract
from deblur_deploy.errors import InputError
from deblur_deploy.files import sha256
from deblur_deploy.media.images import write_image
from deblur_deploy.pipeline import build as build_module
from deblur_deploy.pipeline import bundle as bundle_module
from deblur_deploy.pipeline.config import Int8Config, VerifyConfig
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.pruning.config import PruneConfig
from deblur_deploy.pipeline.recipe import Recipe, read_recipe, write_recipe
from deblur_deploy.training.checkpoint import save_checkpoint
from deblur_deploy.training.validation import TorchRestorer
from tests.photos import photo
from tests.small import RECIPE, unet

network = partial(unet, "stem2")
VARIANTS = {"fp32", "fp16", "float", "int8", "int8-planes"}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Nobody's cache but this module's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEBLUR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A checkpoint, pairs, calibration photographs and a recipe that uses them."""
    folder = tmp_path_factory.mktemp("export")
    save_checkpoint(network(), folder / "small.safetensors")
    for seed in range(2):
        for kind in ("blur", "calibration"):
            write_image(folder / kind / f"{seed}.png", cv2.GaussianBlur(photo(seed), (0, 0), 1.2))
        write_image(folder / "sharp" / f"{seed}.png", photo(seed))
    recipe = msgspec.structs.replace(RECIPE, pairs=folder, calibration=folder / "calibration")
    write_recipe(recipe, folder / "recipe.toml")
    return folder


def call(*arguments):
    return guarded("deblur-export", lambda _: command([str(argument) for argument in arguments]))()


@pytest.fixture(scope="module")
def bundle(room):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        arguments = (room / "small.safetensors", "--out", room / "bundle", "--recipe-file", room / "recipe.toml")
        assert call(*arguments, "--json") == 0
    (room / "printed.json").write_text(printed.getvalue())
    return room / "bundle"


def test_the_bundle_is_complete_and_its_hashes_are_true(room, bundle):
    files = {path.name for path in bundle.iterdir()}
    assert files == {f"{name}.onnx" for name in VARIANTS} | {"bundle.json", "recipe.toml", "report.html", "README.md"}
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert manifest["checkpoint_sha256"] == sha256(room / "small.safetensors")
    for row in manifest["variants"]:
        assert row["sha256"] == sha256(bundle / row["file"])
        assert row["latency_ms"]["cpu"] > 0
    made = {name: digest for stage in manifest["stages"] for name, digest in stage["outputs"].items()}
    assert manifest["differing_from_source"] <= RECIPE.verify.max_differing
    assert {row["file"]: row["sha256"] for row in manifest["variants"]}.items() <= made.items()


def test_every_file_carries_its_contract(room, bundle):
    for variant in Bundle.read(bundle).variants.values():
        metadata = {entry.key: entry.value for entry in onnx.load(variant.path).metadata_props}
        contract = ModelContract.from_metadata(metadata, variant.path)
        assert (contract.precision, contract.io) == (variant.precision, variant.io)
        assert contract.parent_sha256 == sha256(room / "small.safetensors")
        assert contract.size_divisor == network().config.size_divisor


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_engine_runs_the_bundle(bundle, precision):
    image = photo(5, 61, 83)
    restored = DeblurEngine(bundle, provider="cpu", precision=precision)(image)
    limit = {"fp32": 1, "fp16": 1, "int8": 40}[precision]
    assert np.abs(restored.astype(int) - TorchRestorer(network())(image)).max() <= limit


def test_the_recipe_in_the_bundle_gives_the_same_models_again(room, bundle, tmp_path):
    digest = sha256(room / "small.safetensors")
    given = msgspec.structs.replace(read_recipe(room / "recipe.toml"), checkpoint_sha256=digest)
    assert read_recipe(bundle / "recipe.toml") == given
    checkpoint, recipe = room / "small.safetensors", bundle / "recipe.toml"
    assert call(checkpoint, "--out", tmp_path / "again", "--recipe-file", recipe, "--no-cache") == 0
    first, again = (json.loads((path / "bundle.json").read_text()) for path in (bundle, tmp_path / "again"))
    measured = "latency_ms", "runs", "slower_than_fp32_on"
    assert [{key: value for key, value in row.items() if key not in measured} for row in first["variants"]] == [
        {key: value for key, value in row.items() if key not in measured} for row in again["variants"]
    ]
    assert not any(stage["cached"] for stage in again["stages"])


def test_pages_show_every_variant_and_need_nothing_else(bundle):
    page, card = (bundle / "report.html").read_text(), (bundle / "README.md").read_text()
    for name in VARIANTS:
        assert f">{name}</td>" in page
        assert f"| {name} |" in card
    for heading in ("int8: what was tried", "int8: each layer", "int8: calibration"):
        assert heading in page
    assert re.search(
        r"int8: ranges by result \(each holds \d+ to \d+ % of the tiles\) on 2 tiles of 2 images; 100\.0 %", card
    )
    assert page.count("data:image/jpeg;base64,") >= 4
    assert not re.search(r"(src|href)=\"?(https?:)?//", page)


def test_json_is_for_machines(room, bundle):
    rows = json.loads((room / "printed.json").read_text())
    assert {row["name"] for row in rows} == VARIANTS
    assert rows == json.loads((bundle / "bundle.json").read_text())["variants"]


def broken(room, name):
    path = room / name
    if name == "truncated.safetensors":
        path.write_bytes((room / "small.safetensors").read_bytes()[:2000])
    if name == "text.safetensors":
        path.write_text("these are not weights")
    if name == "foreign.safetensors":
        save_file({"weight": network().head.weight.detach()}, path)
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.safetensors", "no such file"),
        ("blur", "is a folder"),
        ("truncated.safetensors", "not a whole safetensors file"),
        ("text.safetensors", "not a whole safetensors file"),
        ("foreign.safetensors", "holds no deblur_deploy U-Net"),
    ],
)
def test_a_wrong_checkpoint_is_one_line_and_status_2(room, tmp_path, capfd, name, message):
    out = tmp_path / "out"
    assert call(broken(room, name), "--out", out, "--recipe-file", room / "recipe.toml") == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("deblur-export: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("nonsense = 1", "no key is called `$.nonsense`; allowed: name, checkpoint_sha256, "),
        ("[int8]\nnonsense = 1", "no key is called `$.int8.nonsense`; allowed: max_drop_db, "),
        ("[int8]\ntiles = 0", "tiles is 0; allowed: 1 or more - at `$.int8.tiles`"),
        ("[int8]\ntiles = 'many'", "Expected `int`, got `str` - at `$.int8.tiles`; allowed: 1 or more"),
        (
            "[int8]\nmethod = 'guess'",
            "'guess' - at `$.int8.method`; allowed: result, minmax, moving_average, percentile, entropy",
        ),
        ("int8 = 8", "Expected `object`, got `int` - at `$.int8`"),
        ("[verify]\nrounds = 2.5", "Expected `int`, got `float` - at `$.verify.rounds`; allowed: 1 to 1000"),
        ("[verify]\nwidth_px = 99999999", "width_px is 99999999; allowed: 1 to 16384 - at `$.verify.width_px`"),
        ("[verify]\nmax_differing = nan", "max_differing is nan; allowed: 0 to 1 - at `$.verify.max_differing`"),
        ("[verify]\nproviders = [1]", "Expected `str`, got `int` - at `$.verify.providers[0]`"),
        ("pairs = 3", "Expected `str`, got `int` - at `$.pairs`"),
        ("name = ", "Invalid value"),
        ("name = 'a'\nname = 'b'", "Cannot overwrite a value"),
        ("pairs = '/nowhere'", "no such folder: /nowhere"),
        ("calibration = '/nowhere'", "no such folder: /nowhere"),
        ("[verify]\nproviders = ['cuda']", "provider cuda"),
        ("[verify]\nproviders = ['gpu9']", "no provider is called 'gpu9'"),
        ("checkpoint_sha256 = '00'", "sha256 00, not for"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_status_2(room, tmp_path, capfd, toml, message):
    (tmp_path / "recipe.toml").write_text(toml)
    recipe = tmp_path / "recipe.toml"
    assert call(room / "small.safetensors", "--out", tmp_path / "out", "--recipe-file", recipe) == 2
    (error,) = capfd.readouterr().err.strip().splitlines()
    assert error.startswith("deblur-export: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_recipe_file_and_other_choices_exclude_each_other(room, tmp_path, capfd):
    arguments = ("--out", tmp_path / "out", "--recipe-file", room / "recipe.toml", "--int8.tiles", "3")
    assert call(room / "small.safetensors", *arguments) == 2
    assert "comes with other choices" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int8.tiles", "0"], "tiles is 0; allowed: 1 or more"),
        (["--nonsense"], "Unrecognized options: --nonsense"),
        (["--int8.method", "guess"], "invalid choice 'guess' for argument '--int8.method'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(tmp_path, capfd, arguments, message):
    assert call("--out", tmp_path / "out", *arguments) == 2
    error = capfd.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_an_existing_folder_is_left_alone(room, bundle, tmp_path, capfd):
    (tmp_path / "mine").write_text("precious")
    assert call(room / "small.safetensors", "--out", tmp_path) == 2
    assert "--force" in capfd.readouterr().err
    assert (tmp_path / "mine").read_text() == "precious"


def again(room, out, *arguments, **changed):
    """Export with the room's recipe, ``changed``; the manifest."""
    recipe = read_recipe(room / "recipe.toml")
    for name, values in changed.items():
        recipe = msgspec.structs.replace(recipe, **{name: msgspec.structs.replace(getattr(recipe, name), **values)})
    write_recipe(recipe, out.with_suffix(".toml"))
    assert call(room / "small.safetensors", "--out", out, "--recipe-file", out.with_suffix(".toml"), *arguments) == 0
    return json.loads((out / "bundle.json").read_text())


def done(manifest):
    return {stage["name"] for stage in manifest["stages"] if not stage["cached"]}


def test_a_failure_in_the_middle_leaves_nothing_and_the_next_run_goes_on(room, bundle, tmp_path, monkeypatch, capfd):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    recipe = msgspec.structs.replace(read_recipe(room / "recipe.toml"), int8=Int8Config(tiles=1, tile_px=64))
    write_recipe(recipe, tmp_path / "recipe.toml")
    arguments = (room / "small.safetensors", "--out", tmp_path / "out", "--recipe-file", tmp_path / "recipe.toml")
    with monkeypatch.context() as patch:
        patch.setattr(Exporter, "int8", full_disk)
        assert call(*arguments) == 2
        assert "No space left on device" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]
    assert call(*arguments) == 0
    assert "export" not in done(json.loads((tmp_path / "out" / "bundle.json").read_text()))


CACHED_RUN = """
import sys
from deblur_deploy.cli.export import command
assert command(sys.argv[1:]) == 0
heavy = {"torch", "onnx", "onnxscript", "matplotlib", "jinja2"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_second_run_does_nothing_twice_and_loads_nothing_for_it(room, bundle, tmp_path):
    arguments = (room / "small.safetensors", "--out", tmp_path / "out", "--recipe-file", room / "recipe.toml")
    run = subprocess.run([sys.executable, "-c", CACHED_RUN, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    first, second = (json.loads((path / "bundle.json").read_text()) for path in (bundle, tmp_path / "out"))
    assert done(second) == set()
    for path in bundle.iterdir():
        if path.name != "bundle.json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    timed = [run.pop("cached") for row in second["variants"] for run in row["runs"]]
    assert timed
    assert all(timed)
    before = [run.pop("cached") for row in first["variants"] for run in row["runs"]]
    assert not any(before)
    assert second["variants"] == first["variants"]
    measured = first["variants"][0]["runs"][0]["measured"]
    assert f"From the cache: cpu was timed on {measured}" in " ".join(run.stdout.split())


@pytest.mark.parametrize(
    ("changed", "stages"),
    [
        ({"verify": {"fp16_max_drop_db": 2.5}}, set()),
        ({"verify": {"rounds": 2}}, {"latency on cpu", "report"}),
        ({"verify": {"random_sizes": 1}}, {"fp32 against its source", "report"}),
        (
            {"int8": {"tiles": 3}},
            {"quantize", "quality of int8", "quality of int8-planes", "latency on cpu", "report"},
        ),
    ],
)
def test_a_changed_option_runs_only_what_depends_on_it(room, bundle, tmp_path, changed, stages):
    changed.setdefault("verify", {})["providers"] = ("cpu",)
    again(room, tmp_path / "before", verify={"providers": ("cpu",)})  # the bundle's report shows every provider here
    assert done(again(room, tmp_path / "out", **changed)) <= stages | ({"report"} if stages else set())
    assert done(again(room, tmp_path / "repeated", **changed)) == set()


def test_photographs_are_known_by_their_content(room, bundle, tmp_path):
    shutil.copytree(room, tmp_path / "room", ignore=shutil.ignore_patterns("bundle"))
    recipe = msgspec.structs.replace(
        read_recipe(room / "recipe.toml"), pairs=tmp_path / "room", calibration=tmp_path / "room" / "calibration"
    )
    write_recipe(recipe, tmp_path / "room" / "recipe.toml")
    assert done(again(tmp_path / "room", tmp_path / "moved")) == set()
    write_image(tmp_path / "room" / "calibration" / "0.png", photo(7))
    assert {"export", "quality of fp32"}.isdisjoint(changed := done(again(tmp_path / "room", tmp_path / "out")))
    assert "quantize" in changed


def test_a_damaged_cache_is_said_and_made_again(room, bundle, tmp_path, capfd):
    for path in Path(os.environ["DEBLUR_CACHE"]).glob("*/int8.onnx"):
        path.write_bytes(path.read_bytes()[:-100])
    # What quantizing found out holds times, so the report that shows them is another one.
    assert done(again(room, tmp_path / "out")) == {"quantize", "report"}
    said = [line for line in capfd.readouterr().err.splitlines() if "was damaged" in line]
    assert said == ["- quantize: the cache was damaged (int8.onnx differs from what was written); made again"]
    assert sha256(tmp_path / "out" / "int8.onnx") == sha256(bundle / "int8.onnx")


def test_providers_may_have_their_long_names():
    recipe = Recipe(
        verify=VerifyConfig(providers=("CPUExecutionProvider", "CPU")), prune=PruneConfig(macs=0.5, provider="CPU")
    )
    named = bundle_module._with_short_names(recipe)
    assert (bundle_module._wished(named), named.prune.provider) == (["cpu"], "cpu")
    with pytest.raises(InputError, match="no provider is called 'auto'; use cpu"):
        bundle_module._with_short_names(Recipe(verify=VerifyConfig(providers=("auto",))))


def test_a_provider_that_was_not_asked_for_and_does_not_work_is_left_out(room, bundle, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("deblur_deploy.pipeline.bundle._wished", lambda _: ["cpu", "cuda"])
    manifest = again(room, tmp_path / "out")
    assert [run["provider"] for run in manifest["variants"][0]["runs"]] == ["cpu"]
    assert "cuda is left out: provider cuda" in capfd.readouterr().err


def test_files_arranged_for_the_cpu_are_held_to_nothing_elsewhere_and_tables_stay_aligned(room, tmp_path, monkeypatch):
    time, wished = build_module.Build.time, ["openvino", "cpu"]

    def renamed(build, provider, artifacts):
        return [replace(run, provider=provider) for run in time(build, "cpu", artifacts)]

    monkeypatch.setattr(bundle_module, "_wished", lambda _: wished)
    monkeypatch.setattr(build_module.Build, "time", renamed)
    rows = {row["name"]: row["latency_ms"] for row in again(room, tmp_path / "out")["variants"]}
    assert {name: list(latency) for name, latency in rows.items()} == dict.fromkeys(VARIANTS, wished) | {
        "int8": ["cpu"]
    }
    line = next(line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if "| int8 |" in line)
    assert re.search(r"\|  \| \d+\.\d \|$", line)
    cells = re.search(r">int8</td>(.*?)</tr>", (tmp_path / "out" / "report.html").read_text(), re.S)
    assert cells[1].count("<td") == 10
