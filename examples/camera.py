"""A loop as in a video call: frames of a camera, restored while the next one is fetched and the last one is shown.

python examples/camera.py            # the first camera, until Ctrl-C
python examples/camera.py talk.mp4   # or a file
"""

import sys
import time
from collections.abc import Iterator

import cv2
import numpy as np

from deblur_deploy import DeblurEngine


def frames(source: int | str) -> Iterator[np.ndarray]:
    camera = cv2.VideoCapture(source)
    camera.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # an old frame is worth nothing in a call
    try:
        while camera.isOpened():
            read, frame = camera.read()
            if not read:
                return
            yield frame[..., ::-1]
    finally:
        camera.release()


def call(source: int | str, engine: DeblurEngine) -> Iterator[np.ndarray]:
    """Restored frames, RGB: hand each to your window, encoder or virtual camera."""
    yield from engine.map(frames(source), ahead=1)


if __name__ == "__main__":
    started = time.perf_counter()
    for count, _ in enumerate(call(sys.argv[1] if len(sys.argv) > 1 else 0, DeblurEngine()), start=1):
        print(f"\r{count} frames, {count / (time.perf_counter() - started):.1f} a second", end="")
    print()
