"""Tools for ONNX graphs, whoever made them: read nodes, rename and replace them, drop what nothing needs, run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from deblur_deploy.errors import ModelError
from deblur_deploy.runtime.providers import first_line


def attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of ``node``, by name."""
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def constants_of(model: ModelProto) -> dict[str, NDArray[Any]]:
    """The initializers of ``model``, by name."""
    return {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}


def makers_of(model: ModelProto) -> dict[str, NodeProto]:
    """The node that gives each value of ``model``, by the value's name."""
    return {name: node for node in model.graph.node for name in node.output}


def renamed(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """A copy of ``node`` that calls its values by ``names``, where these have them."""
    result = NodeProto()
    result.CopyFrom(node)
    for values in (result.input, result.output):
        values[:] = [names.get(value, value) for value in values]
    for attribute in result.attribute:
        # Branches and loops read the names of the graph around them, and may not use them for what they make.
        for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            for value in (*graph.input, *graph.output, *graph.initializer):
                value.name = names.get(value.name, value.name)
            inner = [renamed(one, names) for one in graph.node]
            del graph.node[:]
            graph.node.extend(inner)
    return result


def set_nodes(model: ModelProto, nodes: Iterable[NodeProto]) -> None:
    """Let ``nodes``, which may be some of its own, be those of ``model``, in place."""
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def drop_constants(model: ModelProto, needed: Iterable[str]) -> None:
    """Keep, in place, the constants called ``needed``."""
    names = set(needed)
    kept = [value for value in model.graph.initializer if value.name in names]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def drop_dead(model: ModelProto) -> None:
    """Remove, in place, nodes and constants that no output needs."""
    needed, kept = {value.name for value in model.graph.output}, []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed.update(names_read(node))
    set_nodes(model, reversed(kept))
    drop_constants(model, needed)


def drop_notes(model: ModelProto) -> None:
    """Remove, in place, what is for people only, names files of another machine, or need not hold any longer."""
    del model.metadata_props[:]
    for graph in graphs_of(model.graph):
        del graph.value_info[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]


def with_constants(model: ModelProto, values: Mapping[str, NDArray[Any]]) -> ModelProto:
    """``model`` with other values for the constants that ``values`` names."""
    result = ModelProto()
    result.CopyFrom(model)
    for value in result.graph.initializer:
        if value.name in values:
            value.CopyFrom(numpy_helper.from_array(values[value.name], value.name))
    return result


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """``graph``, and those of its branches and loops, at any depth."""
    yield graph
    for node in graph.node:
        yield from inner_graphs(node)


def inner_graphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs of the branches and loops of ``node``, at any depth."""
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            yield from graphs_of(graph)


def names_read(node: NodeProto) -> set[str]:
    """What ``node`` reads, its branches and loops included."""
    inside = (name for graph in inner_graphs(node) for one in graph.node for name in one.input)
    return {*node.input, *inside}


def names_made(node: NodeProto) -> set[str]:
    """What ``node`` gives, and what is made inside of its branches and loops."""
    found = {name for name in node.output if name}
    for graph in inner_graphs(node):
        found |= {value.name for value in (*graph.input, *graph.initializer)}
        found |= {name for one in graph.node for name in one.output if name}
    return found


def replace_nodes(model: ModelProto, nodes: Iterable[NodeProto], added: Mapping[str, NDArray[Any]]) -> None:
    """Let ``nodes`` be those of ``model``, with constants ``added``, in place; what nothing needs then goes."""
    set_nodes(model, nodes)
    drop_constants(model, {value.name for value in model.graph.initializer} - {*added})
    model.graph.initializer.extend(
        numpy_helper.from_array(np.ascontiguousarray(of), name) for name, of in added.items()
    )
    drop_dead(model)


def observing(model: ModelProto, names: Iterable[str], *, arena: bool = True) -> ort.InferenceSession:
    """A session on the CPU that gives the values called ``names``, and no others, of what ``model`` computes.

    Without ``arena`` it is slower, and keeps no memory between runs, of which an arena takes up to twice what it needs.
    """
    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = arena
    return ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])


class OnnxRunner:
    """Runs an ONNX graph on the CPU; raises ModelError if this onnxruntime does not load it, or not run it."""

    def __init__(self, model: ModelProto, name: str) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        try:
            self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's derive from nothing more narrow
            raise ModelError(f"onnxruntime does not load {name}: {first_line(error)}") from None
        self.name, self.input = name, self.session.get_inputs()[0].name
        self.names = [output.name for output in self.session.get_outputs()]
        self.options = ort.RunOptions()
        self.options.log_severity_level = 4

    def __call__(self, batch: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        try:
            values: list[Any] = self.session.run(self.names, {self.input: batch}, self.options)
        except Exception as error:  # as above
            size = "x".join(map(str, batch.shape))
            raise ModelError(f"onnxruntime does not run {self.name} on {size}: {first_line(error)}") from None
        return dict(zip(self.names, values, strict=True))
