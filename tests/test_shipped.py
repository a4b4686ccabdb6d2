"""What ships with the package: weights, and the bundle that was made from them."""

import json
from pathlib import Path

import numpy as np
import pytest

from deblur_deploy import DeblurEngine
from deblur_deploy.bundles.manifest import Bundle
from deblur_deploy.evaluation.quality import measure
from deblur_deploy.evaluation.record import read_record
from deblur_deploy.files import sha256
from deblur_deploy.pipeline.config import Int8Config
from deblur_deploy.pipeline.photos import builtin_pairs
from deblur_deploy.pipeline.recipe import read_recipe
from deblur_deploy.shipped import DEFAULT_BUNDLE, DEFAULT_CHECKPOINT, MODELS
from deblur_deploy.training.checkpoint import load_checkpoint
from deblur_deploy.training.unet import PRESETS

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def test_the_default_is_hd():
    assert load_checkpoint(DEFAULT_CHECKPOINT).config == PRESETS["hd"]


@pytest.mark.parametrize("folder", sorted(path.parent for path in MODELS.glob("*/bundle.json")), ids=lambda of: of.name)
def test_a_bundle_was_made_from_the_weights_of_its_name(folder):
    manifest = json.loads((folder / "bundle.json").read_text())
    assert manifest["name"] == folder.name
    assert manifest["checkpoint_sha256"] == sha256(folder.with_suffix(".safetensors"))
    for variant in Bundle.read(folder).variants.values():
        assert variant.sha256 == sha256(variant.path)


def test_the_engine_needs_no_argument_and_makes_photographs_better():
    with DeblurEngine(provider="cpu") as engine:
        assert engine.receipt.variant == "int8"
        gains = [measure(engine, pair).gain_db for pair in builtin_pairs()]
    assert np.mean(gains) > 0.4
    assert sorted(gains)[1] > 0.2
    manifest = json.loads((DEFAULT_BUNDLE / "bundle.json").read_text())
    rows = {row["name"]: row for row in manifest["variants"]}
    assert rows["int8"]["drop_db"] < 0.02
    assert np.isfinite(rows["int8"]["psnr"])


def test_no_builtin_photograph_is_made_worse():
    with DeblurEngine(provider="cpu") as engine:
        assert min(measure(engine, pair).gain_db for pair in builtin_pairs()) > -0.1


BUDGET_DB, IMAGE_BUDGET_DB = 0.02, 0.1
_SETS = ("built-in photographs", "synthetic24", "frames9", "gopro6")
SETS = {"article": _SETS} | dict.fromkeys(("hd", "quality"), (*_SETS, "gopro7", "reds5"))


@pytest.mark.parametrize(("network", "data"), [(network, data) for network, sets in SETS.items() for data in sets])
def test_int8_loses_no_more_than_promised(network, data):
    rows = [row for row in quality_of(network).rows if row.data == data]
    (fp32,) = (row for row in rows if row.variant == "fp32")
    int8 = [row for row in rows if row.variant.startswith("int8")]
    assert len(int8) == 2
    assert max(fp32.psnr - row.psnr for row in int8) <= BUDGET_DB


@pytest.mark.parametrize("network", SETS)
def test_int8_loses_no_more_than_promised_on_any_image(network):
    record = quality_of(network)
    assert set(record.settings["sets"]) == set(SETS[network])
    assert max(row.worst_drop_db for row in record.rows if row.variant.startswith("int8")) <= IMAGE_BUDGET_DB


def quality_of(network):
    return read_record(RESULTS / ("" if network == "hd" else network) / "quality.json")


def test_what_was_measured_is_what_ships():
    shipped = {name: variant.sha256 for name, variant in Bundle.read(DEFAULT_BUNDLE).variants.items()}
    assert read_record(RESULTS / "quality.json").settings["files"] == shipped


def test_the_shipped_recipe_and_its_int8_are_whole():
    assert read_recipe(DEFAULT_BUNDLE / "recipe.toml").int8 == Int8Config()
    chosen = json.loads((DEFAULT_BUNDLE / "bundle.json").read_text())["int8"]["chosen"]
    assert chosen["in_float"] == []
    assert chosen["macs"] >= 0.99


@pytest.mark.parametrize("path", sorted(DEFAULT_CHECKPOINT.parent.glob("*.safetensors")), ids=lambda path: path.stem)
def test_the_card_says_what_was_measured_of_these_weights(path: Path):
    record = read_record(RESULTS / f"weights_{path.stem}.json")
    assert record.found["sha256"] == sha256(path)
    card = (path.parent / "README.md").read_text()
    for name, row in record.found["pairs"].items():
        gains = " | ".join(f"{row[key]:+.2f}" for key in ("gain_db", "shifted_gain_db", "worst_gain_db"))
        assert f"| {name} | {len(row['images'])} | {row['psnr_blurred']:.2f} | {row['psnr']:.2f} | {gains} |" in card
