"""A Gradio demo: drop a photograph, move the slider between before and after.

python examples/gradio_demo.py
"""

import gradio as gr
import numpy as np

from deblur_deploy import DeblurEngine

engine = DeblurEngine()


def restore(photo: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    if photo is None:
        raise gr.Error("give a photograph first")
    return photo, engine(photo)


demo = gr.Interface(
    restore,
    gr.Image(label="blurred", image_mode="RGB"),
    gr.ImageSlider(label="before and after", format="png"),
    title="deblur_deploy",
    description=str(engine.receipt),
    flagging_mode="never",
    api_name="restore",
)

if __name__ == "__main__":
    demo.launch()
