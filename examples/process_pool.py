"""A process pool: one engine with one thread in each process, files in and out.

python examples/process_pool.py restored photos/*.jpg
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2

from deblur_deploy import DeblurEngine

engine: DeblurEngine


def load(model: str | None) -> None:
    global engine
    engine = DeblurEngine(model, "cpu", threads=1)


def restore(source: Path, target: Path) -> Path:
    if not cv2.imwrite(str(target), engine(cv2.imread(str(source))[..., ::-1])[..., ::-1]):
        raise OSError(f"cannot write {target}")
    return target


def main(out: Path, sources: list[Path], *, model: str | None = None, processes: int | None = None) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")  # a forked engine would wait for threads that are not there
    with ProcessPoolExecutor(processes or os.cpu_count(), spawn, load, (model,)) as pool:
        return list(pool.map(restore, sources, [out / source.name for source in sources]))


if __name__ == "__main__":
    for done in main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]):
        print(done)
