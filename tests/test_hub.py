"""Bundles at URLs: fetched once, checked before they are kept, and usable without a network afterwards."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from huggingface_hub import ModelCard

from deblur_deploy import DeblurEngine
from deblur_deploy.bundles import hub
from deblur_deploy.cluster.work import packed
from deblur_deploy.errors import DeblurError, MissingExtraError, ModelError, OutputError
from deblur_deploy.files import sha256
from deblur_deploy.pipeline.report import front_matter
from deblur_deploy.shipped import DEFAULT_BUNDLE, DEFAULT_CHECKPOINT
from tests.conftest import noise


@pytest.fixture
def store(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """A store in memory with the bundle at ``memory://hub/tiny``, and an empty cache."""
    monkeypatch.setenv("DEBLUR_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(str(bundle), "/hub/tiny", recursive=True)
    yield memory
    memory.rm("/hub", recursive=True)


@pytest.mark.parametrize(
    ("name", "is_"),
    [
        ("s3://bucket/a", "s3://bucket/a"),
        ("file:///tmp/a", "file:///tmp/a"),
        ("a/b", None),
        (r"C:\a", None),
        ("C:/a", None),
    ],
)
def test_a_url_that_was_a_path_for_a_while(name: str, is_: str | None) -> None:
    assert hub.url(name) == hub.url(Path(name)) == is_


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "hub").glob("*/*"))


@pytest.mark.parametrize("given", ["memory://hub/tiny", Path("memory://hub/tiny")], ids=["text", "path"])
def test_a_bundle_at_a_url_is_the_bundle(store, bundle: Path, given: str | Path) -> None:
    image = noise(20, 30, 3)
    with DeblurEngine(given, "cpu") as engine:
        np.testing.assert_array_equal(engine(image), DeblurEngine(bundle, "cpu")(image))
        assert engine.receipt.model == "tiny"
        assert pickle.loads(pickle.dumps(engine)).receipt.model == "tiny"
    _, files = packed(Path("memory://hub/tiny"))
    assert files["int8.onnx"] == (bundle / "int8.onnx").read_bytes()


def test_it_is_fetched_once_and_needs_no_network_then(store, monkeypatch, tmp_path: Path) -> None:
    folder = hub.fetched("memory://hub/tiny")
    names = ["bundle.json", "float.onnx", "fp16.onnx", "fp32.onnx", "int8.onnx"]
    assert kept(tmp_path) == names

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(type(store), "_open", refuse)
    monkeypatch.setattr(type(store), "cat_file", refuse)
    with pytest.warns(RuntimeWarning, match=r"memory://hub/tiny is out of reach \(no network\); its last copy is used"):
        assert hub.fetched("memory://hub/tiny") == folder
    with pytest.raises(ModelError, match="cannot fetch memory://hub/other: no network"):
        hub.fetched("memory://hub/other")


def test_a_changed_bundle_is_another_copy(store) -> None:
    first = hub.fetched("memory://hub/tiny")
    manifest = json.loads(store.cat_file("/hub/tiny/bundle.json"))
    store.pipe_file("/hub/tiny/bundle.json", json.dumps({**manifest, "name": "other"}).encode())
    assert hub.fetched("memory://hub/tiny") != first


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("int8.onnx", b"another", "memory://hub/tiny/int8.onnx is not the file that its bundle.json describes"),
        ("int8.onnx", None, "cannot fetch memory://hub/tiny/int8.onnx"),
        ("bundle.json", None, "memory://hub/tiny is no bundle"),
        ("bundle.json", b"{", "bundle.json is damaged"),
        ("bundle.json", b'{"variants": [{"file": "../../x", "sha256": ""}]}', "not a file inside the bundle"),
        ("bundle.json", b'{"schema": 9, "variants": []}', "memory://hub/tiny/bundle.json has schema 9"),
    ],
)
def test_what_is_no_good_is_not_kept(store, tmp_path: Path, file: str, content: bytes | None, says: str) -> None:
    if content is None:
        store.rm(f"/hub/tiny/{file}")
    else:
        store.pipe_file(f"/hub/tiny/{file}", content)
    with pytest.raises(ModelError, match=says) as raised:
        DeblurEngine("memory://hub/tiny")
    assert "\n" not in str(raised.value)
    assert kept(tmp_path) == []


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"cut")], ids=["missing", "cut"])
def test_a_damaged_copy_is_fetched_again(store, bundle: Path, harm: Callable[[Path], object]) -> None:
    folder = hub.fetched("memory://hub/tiny")
    harm(folder / "int8.onnx")
    assert hub.fetched("memory://hub/tiny") == folder
    assert (folder / "int8.onnx").read_bytes() == (bundle / "int8.onnx").read_bytes()


def test_two_that_fetch_at_once_both_have_it(store, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = hub._fetch

    def late(*arguments: Any) -> None:
        fetch(*arguments)  # the other one, in between
        monkeypatch.undo()
        raise OutputError("it exists and is not empty")

    monkeypatch.setattr(hub, "_fetch", late)
    assert (hub.fetched("memory://hub/tiny") / "int8.onnx").is_file()


def test_a_cache_that_holds_it_may_be_read_only(store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.fetched("memory://hub/tiny")

    def refuse(path: Path) -> None:
        raise OutputError(f"cannot write {path}: Read-only file system")

    monkeypatch.setattr(hub, "writing_file", refuse)
    assert hub.fetched("memory://hub/tiny") == folder


@pytest.mark.parametrize(
    ("place", "error"), [("nonsense://a/b", DeblurError), ("s3://bucket/bundle", MissingExtraError)]
)
def test_a_store_that_nothing_here_opens_is_one_line(place: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"cannot open {place}") as raised:
        DeblurEngine(place)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("digest", "licence"), [("0" * 64, "unknown"), (None, "mit")])
def test_the_card_is_one_that_hubs_read(digest: str | None, licence: str) -> None:
    card = ModelCard(front_matter(digest or sha256(DEFAULT_CHECKPOINT), ["fp32", "int8"]) + "\n# tiny\n")
    assert card.text.strip() == "# tiny"
    assert card.data.license == licence
    assert card.data.pipeline_tag == "image-to-image"
    assert {"deblurring", "int8"} <= set(card.data.tags)
    assert card.data.metrics == ["psnr", "ssim"]


def test_the_shipped_card_has_what_a_new_one_would() -> None:
    names = [row["name"] for row in json.loads((DEFAULT_BUNDLE / "bundle.json").read_text())["variants"]]
    assert (DEFAULT_BUNDLE / "README.md").read_text().startswith(front_matter(sha256(DEFAULT_CHECKPOINT), names))
