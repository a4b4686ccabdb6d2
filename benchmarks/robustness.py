"""Feeds thousands of damaged images, videos, models and bundles to the runtime: only our own errors may come out.

A mutation may be accepted (a flipped bit in a pixel is still an image) or refused with a DeblurError of one line.
Anything else is a failure: another exception, a crash of the process, or more than 20 seconds.  The work is done in a
child process that names each mutation before it tries it, so that a crash is counted and the rest goes on.

    python -m benchmarks.robustness --count 2000

Without --kind, what came of them is kept as a record.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

sys.path.insert(0, str(Path(__file__).parents[1]))

KINDS = ("image", "video", "onnx", "bundle")
LIMIT_S = 20.0
MAX_PIXELS = 4_000_000


def mutate(data: bytes, random_: random.Random) -> bytes:
    """Truncate, flip bits, overwrite, insert, remove or repeat, one to four times; headers more often than the rest."""
    content = bytearray(data)
    for _ in range(random_.randint(1, 4)):
        if not content:
            break
        reach = min(len(content), 64) if random_.random() < 0.4 else len(content)
        at = random_.randrange(reach)
        match random_.randrange(6):
            case 0:
                del content[at:]
            case 1:
                content[at] ^= 1 << random_.randrange(8)
            case 2:
                content[at : at + 4] = random_.choice(
                    (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", random_.randbytes(4))
                )
            case 3:
                content[at:at] = random_.randbytes(random_.randint(1, 32))
            case 4:
                del content[at : at + random_.randint(1, 64)]
            case 5:
                content[at:at] = content[at : at + random_.randint(1, 256)]
    return bytes(content)


def seeds(kind: str, folder: Path) -> list[Path]:
    """Good files to start from."""
    import cv2
    import numpy as np

    from tests import tiny

    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    if kind == "image":
        for suffix in (".jpg", ".png", ".tif", ".webp", ".bmp", ".gif", ".avif"):
            (folder / f"a{suffix}").write_bytes(cv2.imencode(suffix, noise)[1].tobytes())
    elif kind == "video":
        from tests.test_video import make

        for name, codec in (("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")):
            make(folder / name, codec, "yuv420p", sound=name == "a.mp4")
    else:
        import onnx

        tiny.write_model(folder / "a.onnx")
        tiny.write_model(folder / "b.onnx", precision="int8")
        model = onnx.load(folder / "a.onnx")
        outside = model.graph.initializer[-1]
        outside.ClearField("raw_data")
        outside.data_location = onnx.TensorProto.EXTERNAL
        outside.external_data.add(key="location", value="../../../../etc/passwd")
        (folder / "outside.onnx").write_bytes(model.SerializeToString())
        if kind == "bundle":
            tiny.write_bundle(folder / "bundle")
    return sorted(path for path in folder.iterdir() if path.is_file())


def attempt(kind: str, files: list[Path], folder: Path, seed: int) -> str:
    """Try one mutation; the answer is ``accepted`` or the name of our error."""
    import numpy as np

    from deblur_deploy import DeblurEngine, DeblurError
    from deblur_deploy.media import images, video

    random_ = random.Random(seed)
    try:
        if kind == "bundle":
            source = folder / "bundle"
            names = sorted(path.name for path in source.iterdir())
            name = random_.choice([*names, "bundle.json", "bundle.json"])
            good = (source / name).read_bytes()
            try:
                (source / name).write_bytes(mutate(good, random_))
                DeblurEngine(source, "cpu")(np.zeros((5, 6, 3), np.uint8))
            finally:
                (source / name).write_bytes(good)
            return "accepted"
        original = random_.choice(files)
        path = folder / f"mutated{original.suffix}"
        path.write_bytes(mutate(original.read_bytes(), random_))
        if kind == "image":
            photo = images.read_photo(path, max_pixels=MAX_PIXELS)
            images.read_image(path, max_pixels=MAX_PIXELS)
            images.write_photo(folder / "result", photo, kind=photo.beside and photo.beside.format)
        elif kind == "video":
            video.frame_count(path)
            video.restore_video(path, folder / f"out{path.suffix}", lambda image: image, max_pixels=MAX_PIXELS)
        else:
            DeblurEngine(path, "cpu")(np.zeros((5, 6, 3), np.uint8))
    except DeblurError as error:
        return type(error).__name__ if "\n" not in str(error) else f"FAILED: {type(error).__name__} of several lines"
    except BaseException as error:
        return f"FAILED: {error!r}"[:300]
    return "accepted"


def work(kind: str, first: int, last: int) -> None:
    """The child: one line before and one after each mutation."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = seeds(kind, folder)
        for seed in range(first, last):
            print(json.dumps([seed]), flush=True)
            print(json.dumps([seed, attempt(kind, files, folder, seed)]), flush=True)


def sweep(kind: str, count: int, first: int = 0) -> tuple[Counter[str], list[tuple[int, str]]]:
    """What came of ``count`` mutations, and the failures by seed."""
    outcomes: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    seed, last = first, first + count
    while seed < last:
        command = [sys.executable, __file__, "--child", kind, str(seed), str(last)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        lines: Queue[str] = Queue()
        reader = Thread(target=lambda c=child, q=lines: [q.put(line) for line in c.stdout] + [q.put("")], daemon=True)
        reader.start()
        trying, problem = seed, ""
        while True:
            try:
                line = lines.get(timeout=LIMIT_S + (40 if trying == seed else 0))
            except Empty:
                child.kill()
                problem = f"FAILED: no answer in {LIMIT_S:.0f} s"
                break
            if not line:
                code = child.wait()
                problem = f"FAILED: the process ended with {code}" if code else ""
                break
            trying, *answer = json.loads(line)
            if answer:
                outcomes[answer[0].split(":")[0]] += 1
                if answer[0].startswith("FAILED"):
                    failures.append((trying, answer[0]))
        child.wait()
        reader.join()
        child.stdout.close()
        if problem:
            outcomes["FAILED"] += 1
            failures.append((trying, problem))
        seed = trying + 1
    return outcomes, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="mutations of each kind")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind (may be repeated)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the record")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, first, last = arguments.child
        work(kind, int(first), int(last))
        return 0
    failed, found = 0, {}
    for kind in arguments.kind or KINDS:
        outcomes, failures = sweep(kind, arguments.count, arguments.first)
        print(kind, dict(outcomes.most_common()), flush=True)
        for seed, problem in failures[:20]:
            print(f"  seed {seed}: {problem}")
        failed += len(failures)
        found[kind] = {**outcomes, "failures": failures}
    print(json.dumps({"failures": failed}))
    if not arguments.kind:
        from deblur_deploy.evaluation.record import new_record, write_json

        settings = {"count": arguments.count, "first": arguments.first, "limit_s": LIMIT_S}
        write_json(arguments.out / "robustness.json", new_record("robustness", settings, found=found))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
