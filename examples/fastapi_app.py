"""A FastAPI endpoint: an image in the body, the restored one as PNG in the answer.

    uvicorn examples.fastapi_app:app
    curl --data-binary @blurry.jpg -H "Content-Type: image/jpeg" http://127.0.0.1:8000/restore >sharp.png

For limits, a queue and metrics see ``deblur-serve``.
"""

import cv2
import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool

from deblur_deploy import DeblurEngine

app = FastAPI()
engine = DeblurEngine()


@app.post("/restore")
async def restore(request: Request) -> Response:
    body = np.frombuffer(await request.body(), np.uint8)
    image = cv2.imdecode(body, cv2.IMREAD_COLOR_RGB) if body.size else None
    if image is None:
        raise HTTPException(415, "send one JPEG or PNG image as the body")
    restored = await run_in_threadpool(engine, image)  # may be called from many threads
    _, png = cv2.imencode(".png", restored[..., ::-1])
    return Response(png.tobytes(), media_type="image/png")
