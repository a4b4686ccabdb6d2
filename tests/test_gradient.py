"""Operations in torch are those of the runtime, and have a gradient."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from deblur_deploy.pipeline.int8.gradient import computed
from tests import strangers

CASES = {
    "Conv<kernel_shape = [3, 3], pads = [1, 0, 0, 1], strides = [2, 1], group = 2>(x, w)": {
        "w": strangers.weights(6, 2, 3, 3)
    },
    "Conv<dilations = [2, 1], kernel_shape = [3, 1]>(x, w, b)": {
        "w": strangers.weights(5, 4, 3, 1), "b": np.arange(5, dtype=np.float32)
    },
    "MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]>(x)": {},
    "AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(x)": {},
    "GlobalAveragePool(x)": {},
    "LeakyRelu<alpha = 0.2>(x)": {},
    "PRelu(x, s)": {"s": np.full((4, 1, 1), 0.3, np.float32)},
    "Clip(x, low, high)": {"low": np.float32(-0.5), "high": np.float32(0.5)},
    "DepthToSpace<blocksize = 2, mode = \"CRD\">(x)": {},
    "Softmax<axis = 1>(x)": {},
    "ReduceMean<keepdims = 1>(x, axes)": {"axes": np.array([1])},
    "Transpose<perm = [0, 2, 3, 1]>(x)": {},
    "MatMul(x, w)": {"w": strangers.weights(8, 5)},
    "Sigmoid(x)": {},
    "Mul(x, x)": {},
    "Pow(x, two)": {"two": np.float32(2)},
    "Sub(x, s)": {"s": np.full((4, 1, 1), 0.3, np.float32)},
}  # fmt: skip


@pytest.mark.parametrize("text", CASES)
def test_it_is_what_the_runtime_computes(text: str) -> None:
    model = strangers.graph(f"y = {text}", "float[2,4,6,8] x => (float[a,b,c,d] y)", CASES[text])
    (node,) = model.graph.node
    x = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    constants = {
        value.name: torch.from_numpy(onnx.numpy_helper.to_array(value).copy()) for value in model.graph.initializer
    }
    found = computed(node, [x if name == "x" else constants[name] for name in node.input])
    assert isinstance(found, torch.Tensor)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(found.detach().numpy(), session.run(None, {"x": x.detach().numpy()})[0], atol=1e-5)
    found.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_what_has_no_place_here_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Shape"):
        computed(onnx.helper.make_node("Shape", ["x"], ["y"]), [torch.zeros(1)])
    for kind in ("MaxPool", "AveragePool"):
        for odd in ({"dilations": [2, 2]}, {"auto_pad": "SAME_UPPER"}):
            pool = onnx.helper.make_node(kind, ["x"], ["y"], kernel_shape=[2, 2], **odd)
            with pytest.raises(NotImplementedError, match="pool of another shape"):
                computed(pool, [torch.zeros(1, 2, 8, 8)])
    line = onnx.helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1])
    with pytest.raises(NotImplementedError, match="Conv"):
        computed(line, [torch.zeros(1, 2, 8), torch.zeros(2, 2, 3)])
