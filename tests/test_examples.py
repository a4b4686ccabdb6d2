"""Every example runs, and gives what the engine gives; each is skipped only where its own parts are not installed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from types import ModuleType

import cv2
import numpy as np
import pytest

from deblur_deploy import DeblurEngine
from deblur_deploy.media.images import read_image, write_image
from deblur_deploy.shipped import DEFAULT_BUNDLE
from tests import browser
from tests.photos import photo

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example that the test's parameter names; importable, as its own processes need it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(EXAMPLES), os.environ.get("PYTHONPATH")))))
    yield importlib.import_module(request.param)
    sys.modules.pop(request.param, None)


def test_all_are_short() -> None:
    for path in (*EXAMPLES.glob("*.py"), EXAMPLES / "node" / "restore.mjs"):
        assert 15 <= len(path.read_text(encoding="utf-8").splitlines()) <= 55, path.name


def test_fastapi() -> None:
    pytest.importorskip("fastapi", reason="fastapi is not installed; pip install 'deblur-deploy[examples]'")
    from starlette.testclient import TestClient

    app = loaded("fastapi_app")
    client = TestClient(app.app)
    image = photo(0)
    answer = client.post("/restore", content=encoded(image))
    restored = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(restored, app.engine(image))
    assert [client.post("/restore", content=body).status_code for body in (b"", b"no image")] == [415, 415]


@pytest.mark.slow
def test_gradio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed; pip install 'deblur-deploy[examples]'")
    # In a process of its own, since what it imports warns of many things.
    source = tmp_path / "a.png"
    write_image(source, photo(0))
    code = f"""
from pathlib import Path
from gradio_client import Client, handle_file
import gradio_demo
from deblur_deploy.media.images import read_image
_, url, _ = gradio_demo.demo.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
before, after = Client(url, verbose=False).predict(handle_file({str(source)!r}), api_name="/restore")
image = read_image(Path({str(source)!r}))
assert (read_image(Path(before)) == image).all()
assert (read_image(Path(after)) == gradio_demo.engine(image)).all()
gradio_demo.demo.close()
"""
    path = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "NO_PROXY": "127.0.0.1,localhost"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_camera(tmp_path: Path, bundle: Path) -> None:
    source = str(tmp_path / "talk.avi")
    writer = cv2.VideoWriter(source, cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 48))
    for i in range(5):
        writer.write(photo(i, 48, 64))
    writer.release()
    camera, engine = loaded("camera"), DeblurEngine(bundle)
    restored = list(camera.call(source, engine))
    assert len(restored) == 5
    for frame, result in zip(camera.frames(source), restored, strict=True):
        np.testing.assert_array_equal(result, engine(frame))


@pytest.mark.slow
@pytest.mark.parametrize("example", ["torch_transform"], indirect=True)
def test_torch_transform_in_a_loaders_process(example: ModuleType, tmp_path: Path, bundle: Path) -> None:
    from torch.utils.data import DataLoader

    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, path in enumerate(paths):
        write_image(Path(path), photo(i))
    photos = example.Photos(paths, example.Deblur(bundle))
    batches = list(DataLoader(photos, batch_size=3, num_workers=1, multiprocessing_context="spawn"))
    expected = [DeblurEngine(bundle, "cpu")(photo(i)) for i in range(3)]
    np.testing.assert_array_equal(batches[0].permute(0, 2, 3, 1).numpy(), expected)
    half = example.Deblur(bundle)(batches[0][0].float() / 255)
    assert half.dtype == np.float32 or str(half.dtype) == "torch.float32"


@pytest.mark.slow
@pytest.mark.parametrize("example", ["process_pool"], indirect=True)
def test_process_pool(example: ModuleType, tmp_path: Path, bundle: Path) -> None:
    sources = [tmp_path / f"{i}.png" for i in range(4)]
    for i, source in enumerate(sources):
        write_image(source, photo(i))
    done = example.main(tmp_path / "out", sources, model=str(bundle), processes=2)
    assert done == [tmp_path / "out" / source.name for source in sources]
    engine = DeblurEngine(bundle, "cpu")
    for i, path in enumerate(done):
        np.testing.assert_array_equal(read_image(path), engine(photo(i)))


def needs_node_modules(folder: str) -> Path:
    place = EXAMPLES / folder
    if not (place / "node_modules").is_dir():
        pytest.skip(f"examples/{folder} is not installed; run npm ci there")
    return place


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("node"), reason="no node on PATH")
@pytest.mark.parametrize("kind", ["colour", "gray", "turned"])
def test_node(tmp_path: Path, kind: str) -> None:
    place = needs_node_modules("node")
    image = photo(1, 90, 121)
    if kind == "gray":
        image = np.repeat(image[..., :1], 3, axis=2)
        cv2.imwrite(str(tmp_path / "a.png"), image[..., 0])
    elif kind == "turned":
        write_turned(tmp_path / "a.png", image)
        image = np.rot90(image, -1)
    else:
        write_image(tmp_path / "a.png", image)
    command = ["node", place / "restore.mjs", tmp_path / "a.png", tmp_path / "b.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    expected = DeblurEngine(DEFAULT_BUNDLE / "int8.onnx", "cpu")(np.ascontiguousarray(image))
    assert apart(read_image(tmp_path / "b.png"), expected) <= 1
    assert subprocess.run(command[:2], capture_output=True).returncode == 2


def headers() -> Path | None:
    """The folder of ONNX Runtime's C++ headers, if the compiler's own or one that ORT_INCLUDE names has them."""
    named = [Path(os.environ["ORT_INCLUDE"])] if "ORT_INCLUDE" in os.environ else []
    folders = [*named, *(Path(root) / "onnxruntime" for root in ("/usr/include", "/usr/local/include"))]
    return next((folder for folder in folders if (folder / "onnxruntime_cxx_api.h").is_file()), None)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++") or sys.platform != "linux", reason="no C++ compiler, or not Linux")
def test_cpp(tmp_path: Path) -> None:
    include = headers()
    if include is None:
        pytest.skip("no headers of ONNX Runtime's C++ API; install libonnxruntime-dev or set ORT_INCLUDE")
    # The library is the one that Python runs: the API that older headers ask for is in every later one.
    import onnxruntime

    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    program = tmp_path / "restore"
    source = EXAMPLES / "cpp" / "restore.cpp"
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-isystem{include}", source, library]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}", "-o", program], check=True)
    (tmp_path / library.name).symlink_to(library)
    soname = tmp_path / ".".join(library.name.split(".")[:3])
    soname.symlink_to(library)
    image = photo(4, 75, 98)
    cv2.imwrite(str(tmp_path / "a.ppm"), image[..., ::-1])
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    model = DEFAULT_BUNDLE / "int8.onnx"
    done = subprocess.run([program, model, tmp_path / "a.ppm", tmp_path / "b.ppm"], env=environment)
    assert done.returncode == 0
    assert apart(read_ppm(tmp_path / "b.ppm"), DeblurEngine(model, "cpu")(image)) <= 1
    done = subprocess.run([program, model, model, tmp_path / "c.ppm"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def read_ppm(path: Path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1]


def write_turned(path: Path, image: np.ndarray) -> None:
    """A PNG whose EXIF says that it is to be turned by 90 degrees clockwise."""
    exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    blocks = [cv2.IMAGE_METADATA_EXIF], [np.frombuffer(exif, np.uint8)[None]]
    done, data = cv2.imencodeWithMetadata(".png", image[..., ::-1], *blocks)
    assert done
    path.write_bytes(data.tobytes())


def apart(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two images, in levels."""
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.fixture
def page() -> Iterator[str]:
    """URL of the page, as its own server serves it."""
    if not (browser.CHROMIUM and browser.CHROMEDRIVER):
        pytest.skip("no chromium and chromedriver on PATH")
    needs_node_modules("browser")
    serving = loaded("browser/serve").server()
    Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}/"
    serving.shutdown()
    serving.server_close()


DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], arguments[1]));
document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
"""


def dropped(chromium: browser.Browser, data: bytes, name: str) -> tuple[str, str]:
    """Drop a file on the page; its state and status line at the end."""
    chromium.script(DROP, b64encode(data).decode(), name)
    deadline = time.monotonic() + 120
    while (state := chromium.script("return document.body.dataset.state")) == "busy":
        assert time.monotonic() < deadline, chromium.script("return document.getElementById('status').textContent")
        time.sleep(0.05)
    return state, chromium.script("return document.getElementById('status').textContent")


def shown(chromium: browser.Browser) -> np.ndarray:
    """The restored image that the page shows."""
    url = chromium.script("return document.getElementById('after').toDataURL('image/png')")
    data = np.frombuffer(b64decode(url.partition(",")[2]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "size"), [("", (120, 161)), ("?tile=64", (200, 303))], ids=["whole image", "tiles without seams"]
)
def test_browser_on_webassembly(page: str, query: str, size: tuple[int, int]) -> None:
    image = photo(2, *size)
    with browser.Browser() as chromium:
        chromium.open(page + query)
        assert chromium.script("return crossOriginIsolated") is True
        state, status = dropped(chromium, encoded(image), "a.png")
        assert state == "done", status
        assert status.startswith(f"{size[1]}x{size[0]} in ")
        assert f"int8 on WebAssembly, {os.cpu_count()} thread" in status
        assert apart(shown(chromium), DeblurEngine(DEFAULT_BUNDLE / "int8.onnx", "cpu")(image)) <= 1
        chromium.script(
            "const s = document.getElementById('slider'); s.value = 80; s.dispatchEvent(new Event('input'))"
        )
        clip = chromium.script("return getComputedStyle(document.getElementById('after')).clipPath")
        assert clip == "inset(0px 0px 0px 80%)"
        assert chromium.script("return document.getElementById('save').download") == "a-restored.png"
        state, status = dropped(chromium, b"no image", "b.txt")
        assert (state, "b.txt is not an image" in status) == ("failed", True)
        assert [entry for entry in chromium.log("browser") if entry["level"] == "SEVERE"] == []
        asked = re.findall(r'"Network.requestWillBeSent".*?"url":"(http[^"]+)"', str(chromium.log("performance")))
        assert asked
        assert all(url.startswith(page) for url in asked)


@pytest.mark.slow
def test_browser_on_webgpu(page: str) -> None:
    image = photo(3, 64, 91)
    # Chromium's own WebGPU in software, where there is no GPU.
    with browser.Browser("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader") as chromium:
        chromium.open(page)
        if not chromium.script("return (async () => Boolean(await navigator.gpu?.requestAdapter()))()"):
            pytest.skip("this Chromium has no WebGPU, not even in software")
        state, status = dropped(chromium, encoded(image), "a.png")
        assert state == "done", status
        variant = re.search(r"(fp16|fp32) on WebGPU", status)
        assert variant, status
        assert apart(shown(chromium), DeblurEngine(DEFAULT_BUNDLE / f"{variant[1]}.onnx", "cpu")(image)) <= 1


def encoded(image: np.ndarray) -> bytes:
    """PNG of an RGB image."""
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def loaded(name: str) -> ModuleType:
    """An example as a module."""
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
