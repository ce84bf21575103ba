"""A SavedModel that can do more than classify images is refused before TensorFlow loads it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow as tf
from programs import run
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2
from tensorflow.python.framework import op_def_registry
from test_server import encoded, photo, refusal, running, save_network

from cifar10_resnet.errors import UserError
from cifar10_resnet.serving import graph_check
from cifar10_resnet.serving.saved_network import SavedNetwork

Change = Callable[[meta_graph_pb2.MetaGraphDef], object]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved_model")
    save_network(folder)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[Path, Path]:
    """A network that writes a file while TensorFlow loads it. Returns its folder and that file."""
    place = tmp_path_factory.mktemp("hostile")
    written = place / "written"

    class Resource(tf.saved_model.experimental.TrackableResource):
        def _create_resource(self) -> tf.Tensor:
            return tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=[], shared_name="resource")

        def _initialize(self) -> None:
            tf.io.write_file(str(written), "by a SavedModel")

    save_network(place / "saved_model", resource=Resource())
    written.unlink(missing_ok=True)
    return place / "saved_model", written


def changed(saved_model: Path, folder: Path, change: Change) -> str:
    """Copies a SavedModel, changes its description, and returns the copy's folder."""
    shutil.copytree(saved_model, folder)
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    change(saved.meta_graphs[0])
    (folder / "saved_model.pb").write_bytes(saved.SerializeToString())
    return str(folder)


def function_of(meta_graph: meta_graph_pb2.MetaGraphDef, part: str):
    """Returns the first function with this part in its name."""
    functions = meta_graph.graph_def.library.function
    return next(each for each in functions if part in each.signature.name)


def reason(folder: str) -> str:
    with pytest.raises(UserError) as refused:
        SavedNetwork(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_every_operation_that_is_allowed_is_one_of_tensorflows():
    assert {name for name in graph_check.SAVER if op_def_registry.get(name) is None} == set()


def test_a_network_that_writes_a_file_while_it_is_loaded_is_refused(hostile, tmp_path):
    folder, written = hostile
    (tmp_path / "cat.png").write_bytes(encoded(photo(40, 40)))
    command = ("classify", f"--saved_model={folder}", str(tmp_path / "cat.png"))
    error = run(*command, status=1).stderr.strip().splitlines()[-1]
    assert f"--saved_model={folder} is refused: it has the operation WriteFile" in error
    assert "--trust" in error
    assert "is refused" in refusal(f"--saved_model={folder}", "--port=0")
    assert not written.exists()
    # The danger is real: without the check, TensorFlow writes the file.
    assert run(*command, "--trust", "--top=1").stdout
    assert written.read_text() == "by a SavedModel"


def test_with_trust_a_server_takes_any_saved_model(hostile, tmp_path):
    with running(hostile[0], tmp_path / "log", "--trust") as server:
        assert server.post("/classify", encoded(photo(40, 40)))[0] == 200


@pytest.mark.parametrize(
    "operation",
    [
        *("WriteFile", "ReadFile", "MatchingFiles", "PrintV2", "PyFunc", "EagerPyFunc", "SaveV2"),
        *("RestoreV2", "Save", "LoadLibrary", "InitializeTableFromTextFileV2", "XlaCallModule"),
        *("NoSuchOperation", "__inference__traced_save"),
    ],
)
def test_an_operation_that_no_network_needs_is_refused_anywhere(saved_model, tmp_path, operation):
    def in_the_graph(meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
        meta_graph.graph_def.node.add(name="more", op=operation)

    def in_a_function(meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
        function_of(meta_graph, "wrapper").node_def.add(name="more", op=operation)

    def in_a_new_function(meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
        function = meta_graph.graph_def.library.function.add()
        function.signature.name = "more"
        function.node_def.add(name="more", op=operation)

    for number, change in enumerate((in_the_graph, in_a_function, in_a_new_function)):
        folder = changed(saved_model, tmp_path / str(number), change)
        assert f"has the operation {operation}, " in reason(folder)


def call_from_the_graph(meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
    call = meta_graph.graph_def.node.add(name="more", op="StatefulPartitionedCall")
    call.attr["f"].func.name = function_of(meta_graph, "traced_save").signature.name


def call_from_a_function(meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
    call = function_of(meta_graph, "wrapper").node_def.add(name="more", op="PartitionedCall")
    call.attr["f"].func.name = function_of(meta_graph, "traced_save").signature.name


def call_from_a_branch(meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
    call = function_of(meta_graph, "wrapper").node_def.add(name="more", op="If")
    branches = call.attr["branches"].list.func.add()
    branches.name = function_of(meta_graph, "traced_save").signature.name


def offer_as_an_object(meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
    node = meta_graph.object_graph_def.nodes.add()
    name = function_of(meta_graph, "traced_save").signature.name
    node.function.concrete_functions.append(name)


def offer_as_an_implementation(meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
    function_of(meta_graph, "traced_save").attr["api_implements"].s = b"interface"


def rename_like_an_operation(meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
    name = function_of(meta_graph, "traced_save").signature.name
    for node in meta_graph.graph_def.node:
        if node.attr["f"].func.name == name:
            node.attr["f"].func.name = "Relu"
    function_of(meta_graph, "traced_save").signature.name = "Relu"


@pytest.mark.parametrize(
    "change",
    [
        *(call_from_the_graph, call_from_a_function, call_from_a_branch),
        *(offer_as_an_object, offer_as_an_implementation, rename_like_an_operation),
    ],
)
def test_only_the_saver_may_call_the_functions_that_save(saved_model, tmp_path, change):
    assert "SaveV2" in reason(changed(saved_model, tmp_path / "changed", change)) or (
        "MergeV2Checkpoints" in reason(str(tmp_path / "changed"))
    )


def test_the_functions_that_save_may_do_nothing_else(saved_model, tmp_path):
    def write(meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
        function_of(meta_graph, "traced_save").node_def.add(name="more", op="WriteFile")

    assert "operation WriteFile" in reason(changed(saved_model, tmp_path / "changed", write))


def test_a_saved_model_that_is_loaded_in_another_way_is_refused(saved_model, tmp_path):
    def age(meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
        meta_graph.ClearField("object_graph_def")

    folder = changed(saved_model, tmp_path / "old", age)
    assert "cannot be loaded: TensorFlow 2 did not write it." in reason(folder)


def test_a_name_in_the_file_cannot_break_the_line(saved_model, tmp_path):
    def add(meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
        meta_graph.graph_def.node.add(name="more", op="\x1b[2J\n" + 100 * "A")

    assert "?[2J?AAAA" in reason(changed(saved_model, tmp_path / "changed", add))
