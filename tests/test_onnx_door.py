"""Somebody's ONNX file comes in, in any convention, and goes out as files that give what it gives; or is one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from deblur_deploy import DeblurEngine
from deblur_deploy.contract import ModelContract
from deblur_deploy.errors import DeblurError
from deblur_deploy.pipeline import inputs
from deblur_deploy.pipeline.artifact import Artifact
from deblur_deploy.pipeline.config import InputConfig, NetworkConfig
from deblur_deploy.pipeline.convention import Convention, Reference
from deblur_deploy.pipeline.doors.source import Source, open_door
from deblur_deploy.pipeline.export import Exporter, export_variants
from deblur_deploy.pipeline.network import Prepared
from deblur_deploy.pipeline.nodes import OnnxRunner
from deblur_deploy.training.checkpoint import save_checkpoint
from tests import small, strangers
from tests.photos import photo
from tests.strangers import residual, saved

PAIRS = inputs.pairs(None)
IMAGES = [
    photo(0, 1, 1),
    photo(1, 33, 47),
    photo(2, 64, 40),
    np.random.default_rng(0).integers(0, 256, (19, 5, 3), "u1"),
]


def prepared(path: Path, **wish: object) -> tuple[Source, Prepared]:
    source = open_door(path, NetworkConfig(**wish), PAIRS, path.parent)  # type: ignore[arg-type]
    return source, source.prepare()


def files(source: Source, ready: Prepared, folder: Path) -> dict[str, Path]:
    record = export_variants(ready, source.parent, folder)
    return {about["name"]: Artifact.of(about, folder, source.parent).path for about in record["artifacts"]}


def differences(path: Path, reference: object, images: list[np.ndarray] = IMAGES) -> np.ndarray:
    with DeblurEngine(path, provider="cpu") as engine:
        return np.concatenate([np.abs(engine(of).astype(int) - reference(of)).ravel() for of in images])  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["float", "uint8"])
@pytest.mark.parametrize("colour", ["rgb", "bgr"])
@pytest.mark.parametrize(("layout", "span"), [("nchw", "1"), ("nhwc", "255"), ("nchw", "-1"), ("nhwc", "1")])
def test_every_convention_gives_what_the_plain_network_gives(
    layout: str, span: str, colour: str, kind: str, tmp_path: Path
) -> None:
    if kind == "uint8":
        span = "255"
    path = saved(strangers.converted(layout, span, colour, kind), tmp_path / "net.onnx")
    told = {} if kind == "uint8" else {"range": span}
    source, ready = prepared(path, input=InputConfig(colour=colour, **told))  # type: ignore[arg-type]
    how = ready.convention
    assert (how.layout, how.range, how.colour, how.input_bytes) == (layout, span, colour, kind == "uint8")
    assert (ready.network.size_divisor, ready.network.sees_everything) == (1, False)
    # Far away, a byte may not change by a level.
    assert ready.network.receptive_radius_px in ((2,) if kind == "float" else (1, 2))
    assert ready.network.macs_per_pixel == 2 * 27 * 8
    made = files(source, ready, tmp_path / "out" if (tmp_path / "out").mkdir() is None else tmp_path)
    plain = Reference(OnnxRunner(residual(), "plain"), Convention(output="y"))
    for reference in (source.reference(how), plain):
        off = differences(made["fp32"], reference)
        assert off.max() <= 1
        assert np.count_nonzero(off) <= max(1, 1e-3 * off.size)
    assert differences(made["fp16"], plain).max() <= 1
    with DeblurEngine(made["float"], provider="cpu") as engine:
        image = IMAGES[1].astype(np.float32) / 255
        expected = OnnxRunner(residual(), "plain")(image.transpose(2, 0, 1)[None])["y"][0].transpose(1, 2, 0).clip(0, 1)
        np.testing.assert_allclose(engine(image), expected, atol=3e-6 if kind == "float" else 1 / 255)


def stepped(size: int) -> ModelProto:
    """Works in [0, 255], where it rounds to multiples of ``size``; anywhere else it makes images black."""
    nodes = "a = Div(x, size)\nb = Round(a)\ny = Mul(b, size)"
    ends = "float[1,h,w,3] x => (float[1,h,w,3] y)"
    return strangers.graph(nodes, ends, {"size": np.float32(size)})


def test_the_range_is_guessed_on_photographs_and_told(tmp_path: Path) -> None:
    _, ready = prepared(saved(stepped(4), tmp_path / "net.onnx"))
    assert (ready.convention.range, ready.convention.colour, ready.convention.layout) == ("255", "rgb", "nhwc")
    assert "[0, 255]" in ready.notes[0]
    assert "dB on photographs of" in ready.notes[0]
    assert not ready.network.any_batch or ready.convention.any_batch


def test_one_that_restores_nothing_is_taken_as_is_usual(tmp_path: Path) -> None:
    _, ready = prepared(saved(stepped(4000), tmp_path / "net.onnx"))
    assert ready.convention.range == "1"


NEEDS_4 = """
    s = SpaceToDepth<blocksize = 4>(x)
    r = Pad<mode = "reflect">(s, pads)
    c = Conv<kernel_shape = [3, 3]>(r, w)
    d = DepthToSpace<blocksize = 4>(c)
    y = Add(x, d)
"""


def test_sizes_that_it_takes_are_found_and_padded_to(tmp_path: Path) -> None:
    constants = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "w": strangers.weights(48, 48, 3, 3, gain=0.1)}
    net = strangers.graph(NEEDS_4, "float[1,3,h,w] x => (float[1,3,h,w] y)", constants)
    # A network of random weights restores nothing to guess by.
    told = InputConfig(range="1", colour="rgb")
    source, ready = prepared(saved(net, tmp_path / "net.onnx"), input=told)
    assert (ready.convention.divisor, ready.convention.least_px) == (4, 8)
    assert (ready.network.size_divisor, ready.network.least_px, ready.network.residual) == (4, 8, True)
    made = files(source, ready, tmp_path)
    assert differences(made["fp32"], source.reference(ready.convention)).max() <= 1


def test_fixed_sizes_are_freed_where_the_graph_allows_it(tmp_path: Path) -> None:
    fixed = residual("float[1,3,64,64] x => (float[1,3,64,64] y)")
    source, ready = prepared(saved(fixed, tmp_path / "net.onnx"))
    assert ready.network.any_batch
    assert differences(files(source, ready, tmp_path)["fp32"], source.reference(ready.convention)).max() <= 1


def test_one_of_several_outputs_is_taken(tmp_path: Path) -> None:
    net = residual("float[n,3,h,w] x => (float[n,8,h,w] r1, float[n,3,h,w] y, float[n,3,h,w] bad)")
    net.graph.node.append(onnx.helper.make_node("Neg", ["y"], ["bad"]))
    path = saved(net, tmp_path / "net.onnx")
    _, ready = prepared(path)
    assert ready.convention.output == "y"
    assert any("of the outputs y, bad, y is taken" in note for note in ready.notes)
    assert prepared(path, output="bad")[1].convention.output == "bad"
    with pytest.raises(DeblurError, match=r"has no output 'r1' of the image's size; it has: y, bad"):
        prepared(path, output="r1")


def test_names_may_be_ours(tmp_path: Path) -> None:
    net = residual()
    names = {"c1": "pad", "r1": "bytes", "c2": "correction", "w1": "divisor", "b1": "blocks", "x": "image", "y": "full"}
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in net.graph.node]
    for node in nodes:
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
    del net.graph.node[:]
    net.graph.node.extend(nodes)
    for value in (*net.graph.initializer, *net.graph.input, *net.graph.output):
        value.name = names.get(value.name, value.name)
    source, ready = prepared(saved(net, tmp_path / "net.onnx"))
    plain = Reference(OnnxRunner(residual(), "plain"), Convention(output="y"))
    assert differences(files(source, ready, tmp_path)["fp32"], plain).max() <= 1


@pytest.mark.parametrize("net", [residual, strangers.branching])
def test_half_precision_is_widened_and_told(net: Callable[[], ModelProto], tmp_path: Path) -> None:
    source, ready = prepared(saved(strangers.half(net()), tmp_path / "net.onnx"))
    assert ready.notes[0] == "float16 weights are widened to fp32"
    plain = Reference(OnnxRunner(residual(), "plain"), Convention(output="y"))
    assert differences(files(source, ready, tmp_path)["fp32"], plain).max() <= 1


@pytest.mark.parametrize("name", ["net.onnx.data", "net.onnx_data", "weights of it"])
def test_weights_in_another_file_belong_to_it(name: str, tmp_path: Path) -> None:
    path = saved(residual(), tmp_path / "net.onnx", save_as_external_data=True, size_threshold=0, location=name)
    source, _ = prepared(path)
    data = bytearray((tmp_path / name).read_bytes())
    data[3] ^= 1
    (tmp_path / name).write_bytes(data)
    assert open_door(path, NetworkConfig(), PAIRS, tmp_path).parent != source.parent
    (tmp_path / name).unlink()
    with pytest.raises(DeblurError, match=r"keeps weights in another file that is not there|not a whole ONNX file"):
        prepared(path)


def with_a_function() -> ModelProto:
    """The sum at the end is a function of somebody's domain."""
    net = residual()
    last = net.graph.node[-1]
    opsets = [*net.opset_import, onnx.helper.make_opsetid("mine", 1)]
    body = [onnx.helper.make_node(last.op_type, ["a", "b"], ["c"])]
    function = onnx.helper.make_function("mine", "Last", ["a", "b"], ["c"], body, net.opset_import)
    net.functions.append(function)
    call = onnx.helper.make_node("Last", list(last.input), list(last.output), domain="mine")
    last.CopyFrom(call)
    del net.opset_import[:]
    net.opset_import.extend(opsets)
    return net


def of_the_first_kind() -> ModelProto:
    """Initializers are inputs, too."""
    net = residual()
    net.ir_version = 3
    for value in net.graph.initializer:
        net.graph.input.append(onnx.helper.make_tensor_value_info(value.name, value.data_type, value.dims))
    return net


def importing_what_it_does_not_use() -> ModelProto:
    net = residual()
    net.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return net


@pytest.mark.parametrize("net", [with_a_function, of_the_first_kind, importing_what_it_does_not_use])
def test_what_old_and_new_exporters_write_is_taken(net: Callable[[], ModelProto], tmp_path: Path) -> None:
    source, ready = prepared(saved(net(), tmp_path / "net.onnx"))
    plain = Reference(OnnxRunner(residual(), "plain"), Convention(output="y"))
    assert differences(files(source, ready, tmp_path)["fp32"], plain).max() <= 1


def nan() -> ModelProto:
    net = residual()
    value = net.graph.initializer[0]
    value.CopyFrom(numpy_helper.from_array(np.full((8, 3, 3, 3), np.nan, np.float32), value.name))
    return net


TWICE = "s = DepthToSpace<blocksize = 2>(x)\ny = Concat<axis = 1>(s, s, s)"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (strangers.custom(residual(), "Foo", "com.example"), "not ONNX's own: com.example.Foo"),
        (strangers.custom(residual(), "Foo"), "an operation that ONNX does not know: Foo"),
        (strangers.custom(residual(), "QuantizeLinear"), r"is quantized already \(QuantizeLinear\)"),
        (nan(), r"weights that are NaN \(w1\)"),
        (residual("float[n,1,h,w] x => (float[n,3,h,w] y)"), "x: float nx1xhxw; an image of three channels"),
        (residual("int32[n,3,h,w] x => (int32[n,3,h,w] y)"), "x: int32 nx3xhxw; an image of four dimensions"),
        (residual("float[n,3] x => (float[n,3] y)"), "x: float nx3; an image of four dimensions"),
        (residual("float[n,3,h,w] x, float[n] t => (float[n,3,h,w] y)"), r"takes 2 inputs \(x: .*, t: float n\)"),
        (residual("float[n,3,h,w] x => (float[n,8,h,w] r1)"), "no network from images to images: .* r1 of shape 1x8x"),
        (
            strangers.graph(
                "y = Resize<mode = \"nearest\">(x, , scales)", "float[n,3,h,w] x => (float[n,3,a,b] y)",
                {"scales": np.array([1, 1, 2, 2], np.float32)},
            ),
            "makes images 2 times as large",
        ),
        (
            strangers.graph(
                "a = Reshape(x, shape)\ny = Identity(a)", "float[1,3,64,64] x => (float[1,3,64,64] y)",
                {"shape": np.array([1, 3, 64, 64])},
            ),
            "works on 64x64 only",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_graph_is_one_line(model: ModelProto, said: str, tmp_path: Path) -> None:
    with pytest.raises(DeblurError, match=said) as caught:
        prepared(saved(model, tmp_path / "net.onnx"))
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path / "net.onnx") in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"these are no weights", residual().SerializeToString()[:300]])
def test_what_is_no_whole_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(DeblurError, match=r"not a whole ONNX file|holds no network|not a valid ONNX graph"):
        prepared(tmp_path / "net.onnx")


@pytest.mark.parametrize("name", ["fp32", "floats"])
@pytest.mark.parametrize("net", ["stem4", "classic"])
def test_a_file_of_ours_comes_back_as_it_was(net: str, name: str, tmp_path: Path) -> None:
    exporter = small.exporter(tmp_path, net)
    path = getattr(exporter, name)().path
    source, ready = prepared(path)
    # The exporter leaves out biases of zeros.
    assert ready.network == msgspec.structs.replace(exporter.network, parameters=ready.network.parameters)
    again = Exporter(ready.network, ready.body, source.parent, tmp_path / "again")
    (tmp_path / "again").mkdir()
    assert again.layouts == exporter.layouts
    one, two = (onnx.load(path) for path in (exporter.fp32().path, again.fp32().path))
    assert one.graph == two.graph
    assert differences(again.fp32().path, source.reference(ready.convention)).max() <= (name == "floats")


def test_a_file_of_ours_in_int8_is_refused(tmp_path: Path) -> None:
    path = small.exporter(tmp_path).fp32().path
    model = onnx.load(path)
    contract = ModelContract.from_metadata({entry.key: entry.value for entry in model.metadata_props}, path)
    onnx.helper.set_model_props(model, replace(contract, precision="int8").to_metadata())
    onnx.save(model, path)
    with pytest.raises(DeblurError, match=r"is int8, which would be rounded twice; give the fp32\.onnx beside it"):
        prepared(path)


@pytest.mark.parametrize("wish", [{"divisor": 8}, {"output": "y"}, {"input": InputConfig(range="255")}])
def test_what_is_known_of_a_network_of_ours_is_not_asked_for(wish: dict[str, object], tmp_path: Path) -> None:
    save_checkpoint(small.unet(), tmp_path / "net.safetensors")
    for path in (tmp_path / "net.safetensors", small.exporter(tmp_path).fp32().path):
        with pytest.raises(DeblurError, match="is a network of ours; leave out --divisor, --output and --input"):
            prepared(path, **wish)


def test_bytes_have_one_range(tmp_path: Path) -> None:
    path = saved(strangers.converted("nhwc", "255", "rgb", "uint8"), tmp_path / "net.onnx")
    with pytest.raises(DeblurError, match=r"takes uint8, whose range is 255; leave out --input\.range 1"):
        prepared(path, input=InputConfig(range="1"))


def test_what_moves_pixels_by_what_it_sees_is_not_cut(tmp_path: Path) -> None:
    nodes = """
        size = Shape(x)
        same = AffineGrid<align_corners = 1>(still, size)
        y = GridSample<align_corners = 1, mode = "linear">(x, same)"""
    still = np.array([[[1, 0, 0], [0, 1, 0]]], np.float32)
    net = strangers.graph(nodes, "float[1,3,h,w] x => (float[1,3,h,w] y)", {"still": still}, opset=20)
    _, ready = prepared(saved(net, tmp_path / "net.onnx"))
    assert ready.network.sees_everything
    assert "GridSample may move a pixel any way" in ready.notes


def test_a_convention_travels_as_a_record() -> None:
    how = Convention(layout="nhwc", range="-1", colour="bgr", output="y", divisor=8, least_px=16, any_batch=False)
    assert msgspec.convert(msgspec.to_builtins(how), Convention) == how
    assert how.words() == "float NHWC BGR in [-1, 1], multiples of 8 from 16"
