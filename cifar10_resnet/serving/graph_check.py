"""Refuses a SavedModel that can do more than classify images, before TensorFlow loads it.

A SavedModel is a program: TensorFlow has operations that read and write files, and TensorFlow runs
some of them while it loads. TensorFlow has over a thousand operations, and each version adds some.
So this file lists the operations that are allowed.
"""

import os

from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

from cifar10_resnet.errors import UserError, printable

FILE = "saved_model.pb"

# These operations compute in memory. Image classifiers use them, from pixels or encoded photos.
OPERATIONS = """
    Abs Add AddN AddV2 All Any ArgMax ArgMin Assert AssignVariableOp AvgPool BatchMatMul
    BatchMatMulV2 BatchMatMulV3 BatchToSpaceND BiasAdd BroadcastTo Cast Ceil ClipByValue Concat
    ConcatV2 Const Conv2D CropAndResize DecodeBmp DecodeImage DecodeJpeg DecodePng
    DepthwiseConv2dNative DisableCopyOnRead Div DivNoNan Einsum Elu Equal Erf Exp ExpandDims
    ExtractJpegShape Fill Floor FloorDiv FloorMod FusedBatchNorm FusedBatchNormV2 FusedBatchNormV3
    Gather GatherNd GatherV2 Greater GreaterEqual Identity IdentityN If L2Loss LRN LeakyRelu Less
    LessEqual Log Log1p LogSoftmax LogicalAnd LogicalNot LogicalOr MatMul Max MaxPool MaxPoolV2
    Maximum Mean Min Minimum MirrorPad Mul Neg NoOp NotEqual OneHot OnesLike Pack Pad PadV2
    PartitionedCall Placeholder PlaceholderWithDefault Pow Prod Range Rank ReadVariableOp RealDiv
    Reciprocal Relu Relu6 Reshape ResizeArea ResizeBicubic ResizeBilinear ResizeNearestNeighbor
    ReverseV2 Round Rsqrt ScaleAndTranslate Select SelectV2 Selu Shape ShapeN Sigmoid Sign Size
    Slice Softmax Softplus Softsign SpaceToBatchND Split SplitV Sqrt Square SquaredDifference
    Squeeze StatefulPartitionedCall StatelessIf StatelessWhile StopGradient StridedSlice Sub Sum
    Tanh TensorListConcatV2 TensorListElementShape TensorListFromTensor TensorListGetItem
    TensorListLength TensorListReserve TensorListSetItem TensorListStack Tile TopKV2 Transpose
    Unpack VarHandleOp VarIsInitializedOp Where While ZerosLike
"""
ALLOWED = frozenset(OPERATIONS.split())
# Each SavedModel contains two functions with these operations, which save and restore it.
SAVER = ALLOWED | {
    *("MergeV2Checkpoints", "RestoreV2", "SaveV2", "ShardedFilename"),
    *("StaticRegexFullMatch", "StringJoin"),
}


def read(folder: str) -> saved_model_pb2.SavedModel:
    """Returns the description of a SavedModel. It loads and runs nothing."""
    with open(os.path.join(folder, FILE), "rb") as file:
        return saved_model_pb2.SavedModel.FromString(file.read())


def refuse_programs(saved: saved_model_pb2.SavedModel, folder: str) -> None:
    """Refuses a SavedModel with an operation that a network for images does not need."""
    if len(saved.meta_graphs) != 1 or not saved.meta_graphs[0].HasField("object_graph_def"):
        # TensorFlow runs such a file's graph in another way, which this check does not cover.
        raise ValueError("TensorFlow 2 did not write it")
    graph = saved.meta_graphs[0].graph_def
    savers = _savers(saved.meta_graphs[0])
    unknown = {node.op for node in graph.node} - ALLOWED
    for function in graph.library.function:
        allowed = SAVER if function.signature.name in savers else ALLOWED
        unknown |= {node.op for node in function.node_def} - allowed
    if unknown:
        raise UserError(
            f"is refused: it has the operation {printable(min(unknown)):.60}, which no network for "
            "images needs. A SavedModel is a program. If you trust its source, use --trust.",
            "saved_model",
            folder,
        )


def _savers(meta_graph: meta_graph_pb2.MetaGraphDef) -> set[str]:
    """Returns the names of the functions that only TensorFlow's saver calls. Loading calls none."""
    others = meta_graph_pb2.MetaGraphDef()
    others.CopyFrom(meta_graph)
    graph, saver = others.graph_def, others.saver_def
    ends = {saver.save_tensor_name.partition(":")[0], saver.restore_op_name}
    nodes = [node for node in graph.node if node.name in ends]
    names = {node.attr["f"].func.name for node in nodes}
    functions = [each for each in graph.library.function if each.signature.name in names]
    for node in nodes:
        graph.node.remove(node)
    for function in functions:
        graph.library.function.remove(function)
    # TensorFlow may replace a function by another one that implements the same interface.
    names -= {each.signature.name for each in functions if "api_implements" in each.attr}
    # If a name is left anywhere, another node or the loader can call the function.
    text = others.SerializeToString()
    return {name for name in names if name.encode() not in text}
