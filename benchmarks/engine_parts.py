"""The parts of ``engine.py``, each run in a process of its own, which imports no more than an app would.

It is called with a part's name and its options as JSON, and answers one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from deblur_deploy import DeblurEngine
from deblur_deploy.contract import INPUT, OUTPUT
from deblur_deploy.system.memory import resident_bytes


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def overhead(options: dict[str, Any]) -> dict[str, Any]:
    """Engine against the session that it uses, at 1280x720, in turn, medians of ms."""
    engine, image = make(options), noise(720, 1280)
    for _ in range(4):
        engine(image)
    session = engine._main._fixed[(1, *image.shape)].bare
    anyshape = engine._main._any.bare
    times: dict[str, list[float]] = {"engine": [], "session": [], "dynamic": []}
    calls = [
        ("engine", lambda: engine(image)),
        ("session", lambda: session.run([OUTPUT], {INPUT: image[None]})),
        ("dynamic", lambda: anyshape.run([OUTPUT], {INPUT: image[None]})),
    ]
    for repeat in range(options["repeats"]):
        # Forth and back, so that none always follows the same other one.
        for name, call in calls if repeat % 2 == 0 else reversed(calls):
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    found = {name: median(values) for name, values in times.items()}
    ratio = median(a / b for a, b in zip(times["engine"], times["session"], strict=True))
    return {
        **found,
        "receipt": asdict(engine.receipt),
        "frames_per_s": 1e3 / found["engine"],
        "engine_over_session": ratio,
        "dynamic_over_fixed": found["dynamic"] / found["session"],
    }


def cold(options: dict[str, Any]) -> dict[str, Any]:
    """New processes: import, load, first 1280x720 image."""
    code = (
        "import time; s = time.perf_counter(); import numpy as np; from deblur_deploy import DeblurEngine;"
        f"e = DeblurEngine({options['model']!r}, {options['provider']!r}, {options['precision']!r},"
        f" threads={options['threads']!r});"
        "l = time.perf_counter();"
        "e(np.zeros((720, 1280, 3), np.uint8)); print(l - s, time.perf_counter() - s)"
    )
    runs, whole = [], []
    for _ in range(options["starts"]):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        whole.append(time.perf_counter() - start)
        runs.append([float(value) for value in done.stdout.split()])
    return {
        "loaded_s": median(r[0] for r in runs),
        "first_image_s": median(r[1] for r in runs),
        "process_s": median(whole),
    }


def memory(options: dict[str, Any]) -> dict[str, Any]:
    """MiB over the bare interpreter with its libraries and one 1280x720 image: when loaded, for the first image, and
    when its size has a session of its own."""
    import onnxruntime

    assert onnxruntime.__version__
    image = noise(720, 1280)
    bare = status_mb("VmRSS")
    engine = make(options)
    found = {"bare_mb": bare, "loaded_mb": status_mb("VmRSS") - bare}
    engine(image)
    found |= {"first_peak_mb": status_mb("VmHWM") - bare, "after_first_mb": status_mb("VmRSS") - bare}
    for _ in range(4):
        engine(image)
    return {**found, "peak_mb": status_mb("VmHWM") - bare, "variant": engine.receipt.variant}


def large(options: dict[str, Any]) -> dict[str, Any]:
    """Peak memory over the bare interpreter with its libraries, and time per megapixel against 1 megapixel."""
    import onnxruntime

    from deblur_deploy.media.images import read_photo, write_photo

    assert onnxruntime.__version__
    bare = status_mb("VmRSS")
    engine = make(options)
    start = time.perf_counter()
    photo = read_photo(Path(options["photo"])) if options["photo"] else None
    image = noise(*options["large"]) if photo is None else photo.pixels
    decoded = time.perf_counter()
    restored = engine(image)
    done = time.perf_counter()
    if photo is not None:
        with tempfile.TemporaryDirectory() as folder:
            write_photo(Path(folder) / "large.jpg", photo.with_pixels(restored))
    peak, megapixels = status_mb("VmHWM") - bare, image.shape[0] * image.shape[1] / 1e6
    small = np.ascontiguousarray(image[:1000, :1000])
    engine(small), engine(small)
    at_1, at_all = [], []
    runs = [(at_1, small, 4, 4.0), (at_all, image, 1, megapixels)]
    for repeat in range(4):
        for times, pixels, calls, done_megapixels in runs if repeat % 2 == 0 else reversed(runs):
            start = time.perf_counter()
            for _ in range(calls):
                engine(pixels)
            times.append((time.perf_counter() - start) / done_megapixels)
    return {
        "megapixels": megapixels,
        "peak_over_bare_mb": peak,
        "first_run_s": done - decoded,
        "s_per_mpx": median(at_all),
        "s_per_mpx_at_1_mpx": median(at_1),
        "ratio": median(a / b for a, b in zip(at_all, at_1, strict=True)),
    }


def threads(options: dict[str, Any]) -> dict[str, Any]:
    """8 threads on one engine against the same images one after the other on another."""
    engine = make(options)
    images = [noise(48 + 16 * (i % 7), 64 + 16 * (i % 5), i) for i in range(options["images"])]
    serial = [engine(image) for image in images]
    other = make(options)

    def differing(_: int) -> int:
        return sum(not np.array_equal(other(image), result) for image, result in zip(images, serial, strict=True))

    with ThreadPoolExecutor(8) as pool:
        return {"images": 8 * len(images), "differing": sum(pool.map(differing, range(8)))}


def soak(options: dict[str, Any]) -> dict[str, Any]:
    """Memory after many calls of varying sizes, against that after the first 1,000."""
    engine, random = make(options), np.random.default_rng(0)
    usual = [(64, 96), (96, 64), (128, 128)]
    trace = {}
    for i in range(options["calls"] + 1):
        if i % 1000 == 0:
            trace[i] = (resident_bytes() or 0) / 2**20
        size = usual[i % 3] if random.random() < 0.5 else tuple(int(n) for n in random.integers(1, 160, 2))
        engine(noise(*size, i))
    after = {count: mb for count, mb in trace.items() if count >= 1000}
    return {
        "calls": options["calls"],
        "mb_after_1000": after[1000],
        "mb_at_most": max(after.values()),
        "growth": max(after.values()) / after[1000] - 1,
    }


def make(options: dict[str, Any]) -> DeblurEngine:
    return DeblurEngine(options["model"], options["provider"], options["precision"], threads=options["threads"])


PARTS = {part.__name__: part for part in (overhead, cold, memory, large, threads, soak)}

if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]](json.loads(sys.argv[2]))))
