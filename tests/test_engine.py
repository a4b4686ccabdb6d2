from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deblur_deploy import DeblurEngine, DeblurError
from deblur_deploy.errors import InputError, MemoryLimitError, MissingFileError, ModelError, ProviderError
from deblur_deploy.media.images import read_image
from deblur_deploy.runtime import engine as engine_module
from deblur_deploy.runtime import session as session_module
from deblur_deploy.runtime import sessions as sessions_module
from deblur_deploy.runtime.pixels import Layout
from deblur_deploy.runtime.restoring import plan_for
from tests import tiny
from tests.conftest import noise, reading_as_nobody, unprivileged


@pytest.fixture(scope="module")
def engine(bundle: Path) -> DeblurEngine:
    return DeblurEngine(bundle, "cpu", "fp32")


def bare(bundle: Path, image: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(bundle / "fp32.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image[None]})[0][0]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (33, 2), (64, 64), (97, 131)])
def test_is_the_bare_session(bundle: Path, engine: DeblurEngine, size: tuple[int, int]) -> None:
    image = noise(*size, 3)
    for _ in range(3):  # any shape first, then a session of its own
        np.testing.assert_array_equal(engine(image), bare(bundle, image))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    batch=st.sampled_from([None, 0, 1, 3]),
    channels=st.sampled_from([None, 1, 3, 4]),
    dtype=st.sampled_from(["u1", "<u2", ">u2", "<f4", ">f4", "<f8"]),
    flip=st.booleans(),
)
def test_any_image_keeps_dtype_shape_and_alpha(
    engine: DeblurEngine, height: int, width: int, batch: int | None, channels: int | None, dtype: str, flip: bool
) -> None:
    if batch is not None and channels is None:
        channels = 3
    shape = tuple(n for n in (batch, height, width, channels) if n is not None)
    scale = {"u": 255 if dtype == "u1" else 65535, "f": 1.0}[np.dtype(dtype).kind]
    image = (np.random.default_rng(height).random(shape) * scale).astype(dtype)
    if flip:
        image = image[..., ::-1] if channels is None else image[..., ::-1, :]
    image.flags.writeable = False
    before = image.copy()
    restored = engine(image)
    assert restored.dtype == image.dtype
    assert restored.shape == image.shape
    assert restored.flags.writeable
    assert restored.flags.c_contiguous
    assert not np.shares_memory(restored, image)
    np.testing.assert_array_equal(image, before)
    if channels == 4:
        np.testing.assert_array_equal(restored[..., 3], image[..., 3])


def test_more_than_8_bits_are_kept(engine: DeblurEngine) -> None:
    image = noise(40, 40, 3)
    coarse = engine(image).astype(float)
    deep = engine(image.astype(np.uint16) * 257)
    assert np.abs(deep / 257 - coarse).max() <= 0.5 + 1e-3
    assert len(np.unique(deep)) > 256
    exact = engine(image / 255.0)
    assert np.abs(exact * 65535 - deep).max() <= 0.5 + 1e-2
    # One step of 16 bits on the way in is seen on the way out.
    assert (engine(image.astype(np.uint16) * 257 ^ 1) != deep).any()


def test_gray_is_the_luminance_of_the_restored_gray(engine: DeblurEngine) -> None:
    gray = noise(24, 31)
    colour = engine(np.repeat(gray[..., None], 3, axis=2)).astype(float)
    assert np.abs(engine(gray) - colour @ [0.299, 0.587, 0.114]).max() <= 0.5 + 1e-3
    np.testing.assert_array_equal(engine(gray[..., None])[..., 0], engine(gray))


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ([[1]], "numpy array, this is list"),
        (np.zeros((4, 4, 3), np.int32), "int32"),
        (np.zeros((4, 4, 3), bool), "bool"),
        (np.zeros((4, 4, 3), complex), "complex128"),
        (np.zeros((4, 4, 2), np.uint8), "(4, 4, 2)"),
        (np.zeros(5, np.uint8), "(5,)"),
        (np.zeros((2, 2, 2, 2, 3), np.uint8), "(2, 2, 2, 2, 3)"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((0, 0), np.uint8), "no pixels"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4), np.inf, np.float32), "inf"),
        (np.full((4, 4), 255.0), "255"),
        (np.full((4, 4), -0.1), "-0.1"),
    ],
)
def test_what_is_no_image_is_named(engine: DeblurEngine, image: object, says: str) -> None:
    with pytest.raises(InputError) as caught:
        engine(image)  # type: ignore[arg-type]
    assert says in str(caught.value)
    assert "HxWxC" in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 150), width=st.integers(1, 150), precision=st.sampled_from(["fp32", "int8"]))
def test_tiles_join_to_the_whole(bundle: Path, height: int, width: int, precision: str) -> None:
    whole, tiled = (_cached(bundle, precision, memory) for memory in (None, 0.6))
    image = noise(height, width, 3, seed=height * 1000 + width)
    np.testing.assert_array_equal(tiled(image), whole(image))


_engines: dict[tuple[str, float | None], DeblurEngine] = {}


def _cached(bundle: Path, precision: str, memory: float | None) -> DeblurEngine:
    key = precision, memory
    if key not in _engines:
        _engines[key] = DeblurEngine(bundle, "cpu", precision, max_memory_mb=memory)
        # A measured value would differ from machine to machine, and with it the tiles.
        assert _engines[key]._main is not None
        _engines[key]._main._bytes_per_pixel = 200
    return _engines[key]


def test_a_memory_limit_really_makes_tiles(bundle: Path) -> None:
    engine = _cached(bundle, "fp32", 0.6)
    assert engine._main is not None
    plan = plan_for(engine._main, noise(150, 150, 3), budget=engine._budget)
    assert len(plan.rows) * len(plan.columns) >= 4


def test_out_of_memory_takes_smaller_tiles_once_then_says_so(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = DeblurEngine(bundle, "cpu", "fp32")
    image, run = noise(300, 300, 3), sessions_module.Sessions.run
    whole = engine(image)
    limit = 60_000

    def scarce(self: object, batch: np.ndarray, **options: bool) -> np.ndarray:
        if batch[0, ..., 0].size > limit:
            raise MemoryLimitError("none left")
        return run(self, batch, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_module.Sessions, "run", scarce)
    np.testing.assert_array_equal(engine(image), whole)
    limit = 0
    with pytest.raises(MemoryLimitError, match="max_memory_mb") as caught:
        engine(image)
    assert isinstance(caught.value, MemoryError)


def test_one_engine_for_many_threads(bundle: Path) -> None:
    engine = DeblurEngine(bundle, "cpu", "int8")
    images = [noise(20 + i % 5, 30, 3, seed=i) for i in range(64)]
    serial = [DeblurEngine(bundle, "cpu", "int8")(image) for image in images[:5]]
    serial += [engine(image) for image in images[5:]]
    fresh = DeblurEngine(bundle, "cpu", "int8")
    with ThreadPoolExecutor(8) as pool:
        for expected, found in zip(serial, pool.map(fresh, images), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_often_seen_shapes_are_compiled_and_bounded(bundle: Path) -> None:
    engine = DeblurEngine(bundle, "cpu", "int8")
    assert engine._main is not None
    for size in range(10, 30):
        for _ in range(20):
            engine(noise(size, size, 3))
    assert 1 <= len(engine._main._fixed) <= sessions_module.MAX_FIXED
    assert len(engine._main._seen) <= 256


def test_a_pickled_engine_gives_the_same(bundle: Path) -> None:
    engine = DeblurEngine(bundle, "cpu", "int8", threads=1, max_memory_mb=64)
    again = pickle.loads(pickle.dumps(engine))
    assert again.receipt.threads == 1
    np.testing.assert_array_equal(again(noise(20, 20, 3)), engine(noise(20, 20, 3)))


def test_a_pickled_engine_finds_its_model_from_another_folder(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.parent)
    pickled = pickle.dumps(DeblurEngine(bundle.name, "cpu"))
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(pickled).receipt.model == "tiny"


def test_engines_are_collected(bundle: Path) -> None:
    engine = DeblurEngine(bundle, "cpu")
    engine(noise(8, 8, 3))
    assert engine._main is not None
    gone = [weakref.ref(one) for one in (engine, engine._main, engine._main._any)]
    del engine
    gc.collect()
    assert [one() for one in gone] == [None] * 3


@pytest.mark.parametrize("locked", ["model", "folder", "bundle.json", "int8.onnx", "m.onnx"])
def test_a_locked_model_is_one_line(locked: str) -> None:
    with unprivileged() as room:
        folder = tiny.write_bundle(room / "model" / "folder")
        tiny.write_model(folder / "m.onnx")
        (
            room / "model" if locked == "model" else room / "model" / locked if locked == "folder" else folder / locked
        ).chmod(0)
        with reading_as_nobody(), pytest.raises(DeblurError, match=r"cannot read .*: Permission denied") as caught:
            DeblurEngine(folder / "m.onnx" if locked == "m.onnx" else folder, "cpu")
    assert "\n" not in str(caught.value)


def test_map_keeps_order_and_overlaps(engine: DeblurEngine) -> None:
    images = [noise(8, 9 + i, 3) for i in range(12)]
    started = threading.Semaphore(0)

    def source() -> object:
        for image in images:
            started.release()
            yield image

    results = engine.map(source(), ahead=2)  # type: ignore[arg-type]
    first = next(results)
    np.testing.assert_array_equal(first, engine(images[0]))
    for _ in range(3):  # the source runs ahead of the consumer
        assert started.acquire(timeout=10)
    for image, result in zip(images[1:], results, strict=True):
        np.testing.assert_array_equal(result, engine(image))


def test_map_raises_at_its_place_and_leaves_no_thread(engine: DeblurEngine) -> None:
    before = threading.active_count()
    results = engine.map([noise(5, 5, 3), np.zeros(3), noise(5, 5, 3)])
    assert next(results).shape == (5, 5, 3)
    with pytest.raises(InputError):
        next(results)
    endless = engine.map(repeat(noise(5, 5, 3)))
    next(endless)
    endless.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_context_manager_closes(bundle: Path) -> None:
    with DeblurEngine(bundle, "cpu") as engine:
        engine(noise(4, 4, 3))
    with pytest.raises(InputError, match="closed"):
        engine(noise(4, 4, 3))


def test_auto_takes_the_fastest_within_the_budget(bundle: Path) -> None:
    receipt = DeblurEngine(bundle, "cpu").receipt
    assert (receipt.variant, receipt.effective_precision, receipt.provider) == ("int8", "int8", "cpu")
    assert receipt.macs == {"cpu": 1.0}
    assert sum(receipt.nodes.values()) == pytest.approx(1)
    assert receipt.load_ms > 0
    assert receipt.versions["onnxruntime"] == ort.__version__


def test_fp16_on_the_cpu_is_honest(bundle: Path) -> None:
    receipt = DeblurEngine(bundle, "cpu", "fp16").receipt
    assert (receipt.precision, receipt.effective_precision) == ("fp16", "fp32")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"model": "absent.onnx"}, MissingFileError, "absent.onnx"),
        ({"provider": "gpu9"}, InputError, "gpu9"),
        ({"precision": "fp8"}, InputError, "fp8"),
        ({"precision": "bf16", "provider": "cpu"}, ProviderError, "bf16"),
        ({"threads": 0}, InputError, "threads"),
        ({"threads": 10**9}, InputError, "from 1 to 1024"),
        ({"threads": 2.0}, InputError, r"threads is 2\.0"),
        ({"threads": True}, InputError, "threads is True"),
        ({"threads": "2"}, InputError, "threads is '2'"),
        ({"model": 5}, InputError, "model is 5"),
        ({"model": b"bundle"}, InputError, "model is bytes"),
        ({"model": "a\0b"}, MissingFileError, "no such model"),
        ({"model": "x" * 5000}, MissingFileError, "name too long"),
        ({"provider": None}, InputError, "provider is NoneType"),
        ({"precision": ["fp32"]}, InputError, "precision is list"),
        ({"max_memory_mb": "400"}, InputError, "max_memory_mb is '400'"),
        ({"options": ["a"], "provider": "cpu"}, InputError, "options is list"),
        ({"options": {"a": 1}, "provider": "cpu"}, InputError, "options is dict"),
        ({"max_memory_mb": 0}, InputError, "max_memory_mb"),
        ({"max_memory_mb": float("inf")}, InputError, "max_memory_mb"),
        ({"options": {"a": "b"}}, InputError, "options"),
    ],
)
def test_bad_arguments_are_named(
    bundle: Path, arguments: dict[str, object], error: type[DeblurError], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        DeblurEngine(**{"model": bundle, **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_no_shipped_model_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("deblur_deploy.bundles.models.DEFAULT_BUNDLE", tmp_path / "none")
    with pytest.raises(MissingFileError, match="no model ships"):
        DeblurEngine()


def test_a_bare_uint8_model_says_what_it_cannot(tmp_path: Path) -> None:
    engine = DeblurEngine(tiny.write_model(tmp_path / "m.onnx"), "cpu")
    assert engine(noise(6, 5)).shape == (6, 5)
    with pytest.raises(InputError, match="uint8 images only"):
        engine(np.zeros((4, 4, 3), np.uint16))


def test_a_float_model_takes_bytes_too(tmp_path: Path, engine: DeblurEngine) -> None:
    image = noise(21, 22, 3)
    restored = DeblurEngine(tiny.write_model(tmp_path / "m.onnx", io="float32"), "cpu")(image)
    assert np.abs(restored.astype(int) - engine(image)).max() <= 1


@pytest.mark.parametrize("damage", ["text", "truncated", "no contract", "empty"])
def test_a_damaged_model_is_named(tmp_path: Path, damage: str) -> None:
    path = tiny.write_model(tmp_path / "m.onnx", contract=damage != "no contract")
    content = {"text": b"hello", "truncated": path.read_bytes()[:-700], "empty": b""}
    path.write_bytes(content.get(damage, path.read_bytes()))
    with pytest.raises(ModelError, match=r"m\.onnx") as caught:
        DeblurEngine(path, "cpu")
    assert "\n" not in str(caught.value)


def test_a_bundle_with_another_file_in_it_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_bundle(tmp_path / "b")
    (folder / "int8.onnx").write_bytes((folder / "fp32.onnx").read_bytes())
    with pytest.raises(ModelError, match=r"int8\.onnx is not the file"):
        DeblurEngine(folder, "cpu")


def test_openvino_fp32_is_really_fp32(bundle: Path, openvino: str, engine: DeblurEngine) -> None:
    image = np.random.default_rng(0).random((60, 50, 3))
    exact = DeblurEngine(bundle, openvino, "fp32")
    assert exact.receipt.effective_precision == "fp32"
    assert np.abs(exact(image) - engine(image)).max() < 1e-5
    assert np.abs(exact(noise(60, 50, 3)).astype(int) - engine(noise(60, 50, 3))).max() <= 1


def test_real_photographs_in_tiles(bundle: Path, data: Path) -> None:
    photo = read_image(min((data / "photos" / "large").glob("*.jpg")))[:900, :1100]
    tiled = DeblurEngine(bundle, "cpu", "int8", max_memory_mb=20)
    np.testing.assert_array_equal(tiled(photo), DeblurEngine(bundle, "cpu", "int8")(photo))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([np.float32, np.float64]))
def test_restored_gray_stays_in_range(data: st.DataObject, dtype: type) -> None:
    value = st.just(1.0) | st.floats(0, 1, width=32)
    rgb = np.array(data.draw(st.lists(st.tuples(value, value, value), min_size=1, max_size=8)), dtype)[None]
    layout = Layout.of(np.ones((1, rgb.shape[1]), dtype))
    for colours in (rgb, np.ones_like(rgb)):
        result = layout.result()
        layout.store(result, 0, colours)
        assert 0 <= result.min() <= result.max() <= 1


def test_many_shapes_from_many_threads_are_counted(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = DeblurEngine(bundle, "cpu", "fp32")
    sessions = engine._main
    assert sessions is not None
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i: sessions._session((1, i, i % 7, 3), False), range(20_000)))
    finally:
        sys.setswitchinterval(switch)
    assert set(found) == {sessions._any}
    assert len(sessions._seen) <= 256


def test_the_session_used_last_is_kept(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = DeblurEngine(bundle, "cpu", "fp32")._main
    assert sessions is not None
    monkeypatch.setattr(sessions, "_create", lambda shape: sessions._any)
    shapes = [(1, 8, 8 + i, 3) for i in range(sessions_module.MAX_FIXED + 1)]
    for shape in (*shapes[:-1], shapes[0], shapes[-1]):
        sessions._session(shape, True)
    assert shapes[0] in sessions._fixed
    assert shapes[1] not in sessions._fixed


def test_sizes_that_do_not_fit_beside_each_other_do_not_take_turns_in_being_compiled(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions, compiled = DeblurEngine(bundle, "cpu", "fp32")._main, list[tuple[int, ...]]()
    assert sessions is not None
    monkeypatch.setattr(sessions, "_create", lambda shape: compiled.append(shape) or sessions._any)
    monkeypatch.setattr(sessions, "_budget", 1)
    upright, wide = (1, 16, 8, 3), (1, 8, 16, 3)
    for _ in range(sessions_module._OFTEN_WHEN_FULL - 1):
        for shape in (upright, wide):
            sessions._session(shape, often=False)
    assert compiled == [upright]
    sessions._session(wide, often=False)
    assert compiled == [upright, wide]


def test_a_shape_that_cannot_be_compiled_runs_all_the_same(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, image, tried = DeblurEngine(bundle, "cpu", "fp32"), noise(31, 33, 3), []

    def fail(shape: tuple[int, ...]) -> object:
        tried.append(shape)
        raise MemoryLimitError("no room")

    monkeypatch.setattr(engine._main, "_create", fail)
    for _ in range(4):
        np.testing.assert_array_equal(engine(image), bare(bundle, image))
    assert tried == [(1, *image.shape)]


def test_out_of_memory_on_loading_is_told_as_such(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = ort.InferenceSession

    def fail(data: bytes, options: ort.SessionOptions, providers: object, **rest: object) -> object:
        if options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL:
            return session(data, options, providers, **rest)  # the reading of the contract
        raise RuntimeError("Failed to allocate memory for requested buffer")

    monkeypatch.setattr(session_module.ort, "InferenceSession", fail)
    with pytest.raises(MemoryLimitError, match="too little memory"):
        DeblurEngine(bundle, "cpu")


def test_the_receipt_for_floats_is_their_own(bundle: Path) -> None:
    engine = DeblurEngine(bundle, "cpu", "int8")
    assert engine.float_receipt is None
    engine(np.zeros((4, 4, 3)))
    assert engine.float_receipt is not None
    assert (engine.float_receipt.variant, engine.float_receipt.effective_precision) == ("float", "fp32")
    assert engine.receipt.effective_precision == "int8"


@pytest.mark.parametrize("error", [RuntimeError("EP Error: kernel\nsecond line"), MemoryError("none left")])
def test_a_compiled_shape_that_cannot_run_falls_back_once(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine, image = DeblurEngine(bundle, "cpu", "fp32"), noise(31, 33, 3)
    sessions = engine._main
    assert sessions is not None
    create, made = sessions._create, []

    def broken(shape: tuple[int, ...]) -> object:
        made.append(create(shape))

        def run(*_: object) -> None:
            raise error

        made[-1].bare = SimpleNamespace(run=run)
        return made[-1]

    monkeypatch.setattr(sessions, "_create", broken)
    expected = bare(bundle, image)
    np.testing.assert_array_equal(engine(image), expected)
    with pytest.warns(RuntimeWarning, match=r"shape \(1, 31, 33, 3\) is not compiled: cpu") as caught:
        np.testing.assert_array_equal(engine(image), expected)
    assert len(caught) == 1
    for _ in range(20):  # without a further word, and without trying again
        np.testing.assert_array_equal(engine(image), expected)
    assert len(made) == 1
    assert not sessions._fixed


def test_a_compiled_shape_that_has_run_fails_as_itself(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, image = DeblurEngine(bundle, "cpu", "fp32"), noise(31, 33, 3)
    for _ in range(3):
        engine(image)
    assert engine._main is not None
    (session,) = engine._main._fixed.values()

    def run(*_: object) -> None:
        raise RuntimeError("the device was lost")

    monkeypatch.setattr(session, "bare", SimpleNamespace(run=run))
    with pytest.raises(ProviderError, match="the device was lost"):
        engine(image)


def test_what_a_pixel_takes_needs_no_session_of_its_own(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = DeblurEngine(bundle, "cpu", "int8")
    assert engine._main is not None
    monkeypatch.setattr(engine._main, "_create", lambda *_: pytest.fail("another session"))
    assert 48 <= engine._main.bytes_per_pixel < 256


@pytest.mark.parametrize(("macs", "taken"), [(26_000, 325), (1_000, 256), (2_300_000, 28_750)])
def test_where_the_system_does_not_tell_a_network_takes_by_what_it_computes(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, macs: float, taken: int
) -> None:
    engine = DeblurEngine(bundle, "cpu", "int8")
    assert engine._main is not None
    monkeypatch.setattr(sessions_module, "resident_bytes", lambda: None)
    engine._main.contract = replace(engine._main.contract, macs_per_pixel=macs)
    assert engine._main.bytes_per_pixel == taken


@pytest.mark.slow
def test_memory_stays_flat_however_large_the_image(bundle: Path) -> None:
    """A view of one small image, so that only the engine and the result take memory; each size in its own process."""
    code = """if True:
        import numpy as np
        from pathlib import Path
        from deblur_deploy import DeblurEngine
        def peak():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
        engine = DeblurEngine(BUNDLE, "cpu", "int8", threads=1, max_memory_mb=16)
        engine(np.zeros((64, 64, 3), np.uint8))
        row = np.random.default_rng(0).integers(0, 256, (1, 2000, 3), np.uint8)
        before = peak()
        result = engine(np.broadcast_to(row, (HEIGHT, 2000, 3)))
        assert (result[400] == result[HEIGHT - 400]).all()
        print(peak() - before - result.nbytes / 2**20)
    """
    more_mb = []
    for height in (1000, 8000):  # 2 and 16 megapixels
        script = code.replace("BUNDLE", repr(str(bundle))).replace("HEIGHT", str(height))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        more_mb.append(float(done.stdout))
    assert abs(more_mb[1] - more_mb[0]) < 8
    assert max(more_mb) < 64
