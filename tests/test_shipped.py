"""What ships with the package: weights, and the bundle that was made from them."""

import json
from pathlib import Path

import numpy as np
import pytest

from deblur_deploy import DeblurEngine
from deblur_deploy.evaluation.quality import measure
from deblur_deploy.evaluation.record import read_record
from deblur_deploy.files import sha256
from deblur_deploy.pipeline.config import Int8Config
from deblur_deploy.pipeline.photos import builtin_pairs
from deblur_deploy.pipeline.recipe import read_recipe
from deblur_deploy.runtime.bundle import Bundle
from deblur_deploy.shipped import DEFAULT_BUNDLE, DEFAULT_CHECKPOINT
from deblur_deploy.training.checkpoint import load_checkpoint
from deblur_deploy.training.unet import PRESETS

ROOT = Path(__file__).parents[1]


def test_the_bundle_was_made_from_the_weights():
    manifest = json.loads((DEFAULT_BUNDLE / "bundle.json").read_text())
    assert manifest["checkpoint_sha256"] == sha256(DEFAULT_CHECKPOINT)
    assert load_checkpoint(DEFAULT_CHECKPOINT).config == PRESETS["hd"]
    for variant in Bundle.read(DEFAULT_BUNDLE).variants.values():
        assert variant.sha256 == sha256(variant.path)


def test_the_engine_needs_no_argument_and_makes_photographs_better():
    with DeblurEngine(provider="cpu") as engine:
        assert engine.receipt.variant == "int8"
        gains = [measure(engine, pair).gain_db for pair in builtin_pairs()]
    assert np.mean(gains) > 0.4
    # One of the eight is made worse: a microscope's picture in which a part moves over the rest.
    worst, second = sorted(gains)[:2]
    assert worst > -0.4
    assert second > 0.2
    manifest = json.loads((DEFAULT_BUNDLE / "bundle.json").read_text())
    rows = {row["name"]: row for row in manifest["variants"]}
    assert rows["int8"]["drop_db"] < 0.02
    assert np.isfinite(rows["int8"]["psnr"])


def test_int8_loses_no_more_than_promised_on_any_set():
    record = read_record(ROOT / "benchmarks" / "results" / "quality.json")
    shipped = {name: variant.sha256 for name, variant in Bundle.read(DEFAULT_BUNDLE).variants.items()}
    assert record.settings["files"] == shipped
    fp32 = {row.data: row.psnr for row in record.rows if (row.variant, row.provider) == ("fp32", "cpu")}
    int8 = [row for row in record.rows if row.variant.startswith("int8")]
    assert {row.data for row in int8} == {*fp32}
    assert len(fp32) == 4
    for row in int8:
        # 0.02 is the aim, and kept on all sets but frames9, which loses 0.028.
        assert fp32[row.data] - row.psnr <= 0.03, row.key
        assert row.worst_drop_db <= 0.1, (row.key, row.worst_image)


def test_the_shipped_recipe_and_its_int8_are_whole():
    assert read_recipe(DEFAULT_BUNDLE / "recipe.toml").int8 == Int8Config()
    chosen = json.loads((DEFAULT_BUNDLE / "bundle.json").read_text())["int8"]["chosen"]
    assert chosen["in_float"] == []
    assert chosen["macs"] >= 0.99


@pytest.mark.parametrize("path", sorted(DEFAULT_CHECKPOINT.parent.glob("*.safetensors")), ids=lambda path: path.stem)
def test_the_card_says_what_was_measured_of_these_weights(path: Path):
    record = read_record(ROOT / "benchmarks" / "results" / f"weights_{path.stem}.json")
    assert record.found["sha256"] == sha256(path)
    card = (path.parent / "README.md").read_text()
    for name, row in record.found["pairs"].items():
        gains = " | ".join(f"{row[key]:+.2f}" for key in ("gain_db", "shifted_gain_db", "worst_gain_db"))
        assert f"| {name} | {len(row['images'])} | {row['psnr_blurred']:.2f} | {row['psnr']:.2f} | {gains} |" in card
