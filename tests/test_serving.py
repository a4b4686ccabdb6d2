"""The engine behind HTTP: what is accepted, what is refused and how, and that nothing is lost under load."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from struct import pack
from threading import Event

import cv2
import httpx2
import numpy as np
import pytest
from starlette.testclient import TestClient

from deblur_deploy import DeblurEngine
from deblur_deploy.cli import common, serve
from deblur_deploy.errors import InputError, MemoryLimitError, ProviderError
from deblur_deploy.serving.app import Limits, application
from tests.conftest import noise


@pytest.fixture(scope="module")
def engine(bundle: Path) -> DeblurEngine:
    return DeblurEngine(bundle, "cpu")


@pytest.fixture
def client(engine: DeblurEngine) -> TestClient:
    return TestClient(application(engine, Limits(max_bytes=200_000, max_pixels=5000, queue=4)))


def encoded(image: np.ndarray, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, image[..., ::-1] if image.ndim == 3 else image)[1].tobytes()


def bomb(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that states any size."""
    head = b"IHDR" + pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + pack(">I", 13) + head + pack(">I", zlib.crc32(head)) + b"\0\0\0\0IEND\xaeB`\x82"


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [(".png", "png"), (".jpg", "jpeg"), (".tif", "tiff"), (".webp", "webp"), (".bmp", "bmp")],
)
def test_the_answer_is_of_the_same_kind_and_the_pixels_are_the_engines(client, engine, suffix, kind) -> None:
    sent = encoded(noise(30, 40, 3), suffix)
    answer = client.post("/restore", content=sent)
    assert (answer.status_code, answer.headers["content-type"]) == (200, f"image/{kind}")
    restored = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR_RGB)
    expected = engine(cv2.imdecode(np.frombuffer(sent, np.uint8), cv2.IMREAD_COLOR_RGB))
    if kind in ("png", "tiff", "bmp"):
        np.testing.assert_array_equal(restored, expected)
    else:
        assert restored.shape == expected.shape


def test_16_bits_stay(client) -> None:
    answer = client.post("/restore", content=encoded(noise(9, 9).astype(np.uint16) * 257))
    assert cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_UNCHANGED).dtype == np.uint16


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 415, "must be a JPEG"),
        (b"hello", 415, "must be a JPEG"),
        (b"RIFF\0\0\0\0WAVEfmt ", 415, "must be a JPEG"),
        (b"\xff\xd8\xff", 422, "damaged"),
        (encoded(noise(30, 40, 3))[:300], 422, "the image is not a PNG image that can be read"),
        (encoded(noise(30, 40, 3), ".jpg")[:20], 422, "damaged"),
        (bomb(100_000, 100_000), 413, "100000x100000 pixels"),
        (encoded(np.zeros((80, 80, 3), np.uint8)), 413, "80x80 pixels, the limit is 0.005 megapixels"),
        (bytes(200_001), 413, "larger than the limit of 0.2 MB"),
        (iter([bytes(150_000)] * 2), 413, "larger than the limit of 0.2 MB"),
    ],
)
def test_what_is_no_good_is_refused_in_one_line(client, body, status, says) -> None:
    answer = client.post("/restore", content=body)
    assert answer.status_code == status
    assert says in answer.text
    assert "\n" not in answer.text
    assert "/tmp" not in answer.text
    assert f'deblur_requests_total{{status="{status}"}} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (InputError("a"), 422, "a"),
        (MemoryLimitError("a"), 413, "a"),
        (ProviderError("a"), 500, "a"),
        (MemoryError("a"), 413, "the image takes more memory than this server has"),
        (OSError(28, "full disk"), 500, "the server cannot keep the image while it works: full disk"),
    ],
)
def test_an_engine_that_fails_is_one_line_too(engine, error, status, says) -> None:
    class Failing:
        receipt = engine.receipt

        def __call__(self, image):
            raise error

    answer = TestClient(application(Failing())).post("/restore", content=encoded(noise(9, 9, 3)))
    assert (answer.status_code, answer.text) == (status, says)


def test_a_server_without_room_for_files_says_so(engine, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    answer = TestClient(application(engine)).post("/restore", content=encoded(noise(9, 9, 3)))
    assert (answer.status_code, answer.text) == (
        500, "the server cannot keep the image while it works: No such file or directory",
    )  # fmt: skip


def test_one_more_than_the_queue_holds_is_told_to_come_back(engine) -> None:
    begun, go = Event(), Event()

    class Slow:
        receipt = engine.receipt

        def __call__(self, image):
            begun.set()
            assert go.wait(30)
            return image

    with TestClient(application(Slow(), Limits(queue=1))) as client, ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/restore", content=encoded(noise(9, 9, 3)))
        assert begun.wait(30)
        assert "deblur_under_way 1.0" in client.get("/metrics").text
        second = client.post("/restore", content=encoded(noise(9, 9, 3)))
        go.set()
        assert (second.status_code, second.headers["retry-after"]) == (503, "1")
        assert first.result().status_code == 200
        assert client.post("/restore", content=encoded(noise(9, 9, 3))).status_code == 200
        assert "deblur_under_way 0.0" in client.get("/metrics").text


@pytest.mark.parametrize("ends", [True, False])
def test_a_body_that_does_not_come_holds_no_place(engine, ends) -> None:
    from anyio import run, sleep

    sent = []

    async def receive():
        await sleep(0 if ends else 60)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    app = application(engine, Limits(queue=1, body_seconds=0.01))
    scope = {"type": "http", "method": "POST", "path": "/restore", "headers": [], "query_string": b""}
    run(app, scope, receive, send)
    assert sent[0]["status"] == (499 if ends else 408)
    assert TestClient(app).post("/restore", content=encoded(noise(9, 9, 3))).status_code == 200


def test_health_says_what_runs(client) -> None:
    assert client.get("/healthz").json()["engine"].startswith("tiny/int8 on cpu")
    assert client.get("/restore").status_code == 405


def mistake(monkeypatch, capsys, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["deblur-serve", *map(str, arguments)])
    assert serve.main() == common.USER_ERROR
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "70000"], "port is 70000; allowed"),
        (["--queue", "0"], "queue is 0; allowed"),
        (["--max-megabytes", "nan"], "max-megabytes is nan"),
        (["--host", "192.0.2.1", "--port", "0"], "cannot listen on 192.0.2.1"),
        (["--model", "none", "--port", "0"], "no such model: none"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, arguments, says) -> None:
    assert says in mistake(monkeypatch, capsys, *arguments)


def test_a_taken_port_is_one_line(monkeypatch, capsys) -> None:
    with serve.listener("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}: " in mistake(monkeypatch, capsys, "--port", port)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_the_command_serves_many_at_once_and_ends_when_told(bundle: Path, engine, number: int, status: int) -> None:
    command = [sys.executable, "-m", "deblur_deploy.cli.serve", "--model", bundle, "--provider", "cpu", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr.readline().startswith("tiny/int8 on cpu")
        url = process.stderr.readline().split()[-1]
        assert url.startswith("http://127.0.0.1:")
        sent = [noise(30 + i, 40, 3, seed=i) for i in range(24)]
        with httpx2.Client(trust_env=False) as client, ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda image: client.post(url, content=encoded(image), timeout=30), sent))
        for image, answer in zip(sent, answers, strict=True):
            got = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR_RGB)
            np.testing.assert_array_equal(got, engine(image))
    finally:
        process.send_signal(number)
        said = process.communicate(timeout=30)[1]
    assert (process.returncode, said) == (status, "")
