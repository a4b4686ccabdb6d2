"""Damaged files and what opens them: one function a kind, which gives our errors or none."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from deblur_deploy import DeblurEngine, DeblurError

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


def _images(folder: Path) -> None:
    import cv2

    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    for suffix in (".jpg", ".png", ".tif", ".webp", ".bmp", ".gif", ".avif"):
        (folder / f"a{suffix}").write_bytes(cv2.imencode(suffix, noise)[1].tobytes())


def _open_image(path: Path) -> None:
    from deblur_deploy.media import images

    photo = images.read_photo(path, max_pixels=MAX_PIXELS)
    images.read_image(path, max_pixels=MAX_PIXELS)
    images.write_photo(path.with_stem("out"), photo, kind=photo.beside.format if photo.beside else None)
    path.with_stem("out").unlink()


def _videos(folder: Path) -> None:
    from tests.test_video import make

    for name, codec in (("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")):
        make(folder / name, codec, "yuv420p", sound=name == "a.mp4")


def _open_video(path: Path) -> None:
    from deblur_deploy.media import video

    video.frame_count(path)
    video.restore_video(path, path.with_stem("out"), lambda image: image, max_pixels=MAX_PIXELS)
    path.with_stem("out").unlink()


def _models(folder: Path) -> None:
    import onnx

    from tests import tiny

    tiny.write_model(folder / "a.onnx")
    tiny.write_model(folder / "b.onnx", precision="int8")
    model = onnx.load(folder / "a.onnx")
    outside = model.graph.initializer[-1]
    outside.ClearField("raw_data")
    outside.data_location = onnx.TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="../../../../etc/passwd")
    (folder / "outside.onnx").write_bytes(model.SerializeToString())


def _open_model(path: Path) -> None:
    DeblurEngine(path, "cpu")(np.zeros((5, 6, 3), np.uint8))


def _bundles(folder: Path) -> None:
    from tests import tiny

    tiny.write_bundle(folder / "bundle")


def _open_bundle(path: Path) -> None:
    _open_model(path.parent)


def _checkpoints(folder: Path) -> None:
    import torch

    from deblur_deploy.training.checkpoint import save_checkpoint
    from tests.small import unet

    save_checkpoint(unet("stem2"), folder / "a.safetensors", {"step": "7"})
    save_checkpoint(unet("flat").half(), folder / "b.safetensors")
    torch.save(unet("flat").state_dict(), folder / "c.pth")


def _open_checkpoint(path: Path) -> None:
    import torch

    from deblur_deploy.training.checkpoint import load_checkpoint

    with torch.no_grad():
        load_checkpoint(path)(torch.zeros(1, 3, 12, 12))


def _recipes(folder: Path) -> None:
    import msgspec

    from deblur_deploy.pipeline.pruning.config import PruneConfig
    from deblur_deploy.pipeline.recipe import Recipe, write_recipe
    from tests.small import RECIPE

    write_recipe(Recipe(), folder / "a.toml")
    pruned = PruneConfig(macs=0.5)
    write_recipe(msgspec.structs.replace(RECIPE, pairs=folder, calibration=folder, prune=pruned), folder / "b.toml")


def _open_recipe(path: Path) -> None:
    from deblur_deploy.pipeline.recipe import read_recipe, write_recipe

    write_recipe(read_recipe(path), path.with_stem("out"))
    read_recipe(path.with_stem("out"))
    path.with_stem("out").unlink()


def _tables(folder: Path) -> None:
    (folder / "pairs.csv").write_text("name,blur,sharp\n" + "".join(f"{i},a.png,a.png\n" for i in range(9)))
    (folder / "a.png").touch()
    rows = [f"{i},0.{900 - i},0.001,9.5,0.1,0.2,25,26.{i},0.8,1.5,0.5\n" for i in range(1, 99, 7)]
    columns = "step,loss,learning_rate,images_per_s,waiting,dead,"
    columns += ",".join(f"set_{name}" for name in ("psnr_blurred", "psnr", "ssim", "gain_db", "worst_gain_db"))
    (folder / "log.csv").write_text(columns + "\n" + "".join(rows))


def _open_table(path: Path) -> None:
    from deblur_deploy.evaluation.pairs import match_pairs
    from deblur_deploy.training.log import Log, read_log

    # Which of the two it was, nobody can tell any more.
    try:
        match_pairs(path)
    finally:
        rows = read_log(path)
        if rows:
            Log(path, ["set"], from_step=50)


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "image": (_images, _open_image),
    "video": (_videos, _open_video),
    "onnx": (_models, _open_model),
    "bundle": (_bundles, _open_bundle),
    "checkpoint": (_checkpoints, _open_checkpoint),
    "recipe": (_recipes, _open_recipe),
    "csv": (_tables, _open_table),
}
"""By kind: what writes good files into a folder, and what opens one of them."""


def seeds(kind: str, folder: Path) -> list[Path]:
    """Good files to start from."""
    KINDS[kind][0](folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    # A manifest is where most can go wrong.
    return files + [path for path in files if path.name == "bundle.json"] * 2


def attempt(kind: str, files: list[Path], seed: int) -> str:
    """Try one mutation; the answer is ``accepted``, the name of our error, or what failed."""
    random_ = random.Random(seed)
    original = random_.choice(files)
    good, inside = original.read_bytes(), kind in ("bundle", "csv")
    path = original if inside else original.with_stem("mutated")
    before = set(original.parent.iterdir()) | {path}
    path.write_bytes(mutate(good, random_))
    try:
        KINDS[kind][1](path)
        answer = "accepted"
    except DeblurError as error:
        lines = str(error).count("\n")
        answer = f"FAILED: {type(error).__name__} of several lines" if lines else type(error).__name__
    except BaseException as error:
        answer = f"FAILED: {error!r}"[:300]
    finally:
        if inside:
            original.write_bytes(good)
    if left := set(original.parent.iterdir()) - before:
        answer = f"FAILED: half files {sorted(one.name for one in left)} after {answer}"
        for one in left:
            one.unlink()
    return answer
