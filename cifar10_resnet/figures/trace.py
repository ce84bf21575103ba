"""Reads the layers of a network from its TensorFlow graph.

The diagrams take their sizes from here, so they always match the real network.
"""

import numpy as np
import tensorflow as tf

from cifar10_resnet.config import ModelConfig
from cifar10_resnet.figures.diagram import Layer, Network, Unit
from resnet_model import IMAGE_SHAPE, ResNet

KINDS = {
    "Conv2D": "convolution",
    "FusedBatchNormV3": "norm",
    "Relu": "relu",
    "AddV2": "add",
    "AvgPool": "pool",
    "Pad": "pad",
    "Mean": "mean",
    "MatMul": "projection",
}


def trace(config: ModelConfig) -> Network:
    """Builds a network, and returns its layers as the graph of its `__call__` contains them."""
    model = ResNet(**config.arguments())
    images = tf.TensorSpec([None, *IMAGE_SHAPE], tf.float32)
    function = tf.function(lambda images: model(images), autograph=False)
    graph = function.get_concrete_function(images).graph
    names = _names_of_reads(graph)

    way, _ = _way_to(graph.outputs[0])
    on_the_way = {operation.name for operation in way}
    parts: dict[str, list[tf.Operation]] = {}
    part = ""
    for operation in way:
        # A variable's name contains the part. ReLUs and additions belong to the part before them.
        if operation.type == "Mean":
            part = "end"
        elif len(operation.inputs) > 1 and operation.inputs[1].op.name in names:
            part = _part(names[operation.inputs[1].op.name])
        parts.setdefault(part, []).append(operation)

    units = {}
    for part, operations in parts.items():
        unit = Unit([_layer(operation) for operation in operations])
        for add in (operation for operation in operations if operation.type == "AddV2"):
            shortcut, source = _way_to(add.inputs[1], on_the_way)
            after = operations.index(source) + 1 if source in operations else 0
            unit = unit._replace(shortcut=[_layer(s) for s in shortcut], shortcut_after=after)
        units[part] = unit

    blocks: dict[str, list[Unit]] = {}
    for part, unit in units.items():
        if part not in ("begin", "end"):
            blocks.setdefault(part.split("/")[0], []).append(unit)
    return Network(
        config,
        IMAGE_SHAPE,
        units["begin"].layers,
        list(blocks.values()),
        units["end"].layers,
        sum(int(np.prod(v.shape)) for v in model.trainable_variables),
    )


def _names_of_reads(graph: tf.Graph) -> dict[str, str]:
    """Returns the names of the variables, by the names of the operations that read them."""
    handles = {id(variable.handle): variable.name for variable in graph.variables}
    names = {inside.op.name: handles[id(outside)] for outside, inside in graph.captures}
    reads = (o for o in graph.get_operations() if o.type == "ReadVariableOp")
    return {read.name: names[read.inputs[0].op.name] for read in reads}


def _part(variable: str) -> str:
    """Returns block2/unit1 for block2/unit1/conv1/kernel:0, and begin or end for the others."""
    if variable.startswith("block"):
        return "/".join(variable.split("/")[:2])
    return "begin" if variable.startswith("init") else "end"


def _way_to(
    tensor: tf.Tensor, starts: set[str] = frozenset()
) -> tuple[list[tf.Operation], tf.Operation]:
    """Returns the layers that lead to a tensor, and their start: one of `starts` or the images."""
    way, operation = [], tensor.op
    while operation.type != "Placeholder" and operation.name not in starts:
        if operation.type in KINDS and not _adds_a_bias(operation):
            way.append(operation)
        operation = operation.inputs[0].op
    return way[::-1], operation


def _adds_a_bias(operation: tf.Operation) -> bool:
    return operation.type == "AddV2" and operation.inputs[1].op.type == "ReadVariableOp"


def _layer(operation: tf.Operation) -> Layer:
    layer = Layer(KINDS[operation.type], tuple(operation.outputs[0].shape[1:]))
    if layer.kind == "convolution":
        size, stride = operation.inputs[1].shape[0], operation.get_attr("strides")[1]
        return layer._replace(size=size, stride=stride)
    if layer.kind == "pool":
        size, stride = operation.get_attr("ksize")[1], operation.get_attr("strides")[1]
        return layer._replace(size=size, stride=stride)
    if layer.kind == "pad":
        return layer._replace(zeros=tuple(map(int, tf.get_static_value(operation.inputs[1])[3])))
    return layer
