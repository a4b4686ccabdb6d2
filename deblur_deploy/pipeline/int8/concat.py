"""What is concatenated is rounded once."""

from __future__ import annotations

from onnx import ModelProto
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import TensorsData

_REARRANGES = ("Transpose", "Reshape", "DepthToSpace")


def tied(body: ModelProto) -> dict[str, str]:
    """What a convolution gives to a concatenation, without a ReLU, and on its way there; each to the concatenation."""
    makers = {node.output[0]: node for node in body.graph.node if node.output}
    result = {}
    for node in body.graph.node:
        if node.op_type != "Concat":
            continue
        for name in node.input:
            chain = [name]
            while chain[-1] in makers and makers[chain[-1]].op_type in _REARRANGES:
                chain.append(makers[chain[-1]].input[0])
            if chain[-1] in makers and makers[chain[-1]].op_type == "Conv":
                result.update(dict.fromkeys(chain, node.output[0]))
    return result


def joined(body: ModelProto, ranges: TensorsData) -> TensorsData:
    """``ranges``, but what is :func:`tied` to a concatenation has the range of the whole.

    It is then rounded once and not twice: in two grids that are nearly the same, the errors would add up to a bias.
    """
    spans = {name: value.range_value for name, value in ranges.items()}
    spans |= {name: spans[whole] for name, whole in tied(body).items() if whole in spans}
    return TensorsData(CalibrationMethod.MinMax, spans)
