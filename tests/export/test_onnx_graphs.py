"""What the exported files are: valid graphs under the signatures' names, the project's nodes with bodies of standard operators, shared weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import AttributeProto, ModelProto, TensorProto
from safetensors import safe_open

from sanawm.config import tiny_config
from sanawm.programs import Geometry, programs
from sanawm_export.onnx.export import check_graph
from sanawm_export.onnx.weights import INLINE_BYTES

PROGRAMS = list(programs(Geometry(tiny_config(), 600)))
# Blocks 0 to 2 are GDN with two fused operations, block 3 transforms q, k, v and the output of its camera branch.
NODES = {"MainGDN": 3, "CameraGDN": 3, "UCPE": 4}
WEIGHTS = {"text_encoder": "text", "image_encoder": "vae", "decode_first": "vae", "decode": "vae"}


@pytest.fixture(scope="module")
def graphs(tiny_bundle: Path) -> dict[str, ModelProto]:
    return {name: onnx.load(tiny_bundle / "programs" / f"{name}.onnx", load_external_data=False) for name in PROGRAMS}


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> dict[str, Any]:
    return json.loads((tiny_bundle / "manifest.json").read_text())


@pytest.mark.parametrize("name", ["text_encoder", "decode", "camera", "denoise_steady", "commit_first"])
def test_checker_and_shape_inference(name: str, tiny_bundle: Path) -> None:
    check_graph(tiny_bundle / "programs" / f"{name}.onnx")


def test_the_checker_checks(tmp_path: Path) -> None:
    def made(operator: str, other: int) -> Path:
        values = [onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, [k]) for n, k in (("a", 2), ("b", other), ("c", 2))]
        graph = onnx.helper.make_graph([onnx.helper.make_node(operator, ["a", "b"], ["c"])], "g", values[:2], values[2:])
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)]), tmp_path / "graph.onnx")
        return tmp_path / "graph.onnx"

    check_graph(made("Add", 2))
    with pytest.raises(onnx.checker.ValidationError, match="NoSuchOperator"):
        check_graph(made("NoSuchOperator", 2))
    with pytest.raises(onnx.shape_inference.InferenceError, match="Incompatible dimensions"):
        check_graph(made("Add", 3))


@pytest.mark.parametrize("name", PROGRAMS)
def test_inputs_and_outputs_are_the_signatures(name: str, graphs: dict[str, ModelProto], manifest: dict[str, Any]) -> None:
    types = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.BOOL: "bool", TensorProto.UINT8: "uint8"}
    graph, entry = graphs[name].graph, manifest["programs"][name]
    for side, values in (("inputs", graph.input), ("outputs", graph.output)):
        found = [(v.name, types[v.type.tensor_type.elem_type], [d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values]
        assert found == [(t["name"], t["dtype"], t["shape"]) for t in entry[side]]


@pytest.mark.parametrize("name", PROGRAMS)
def test_opsets(name: str, graphs: dict[str, ModelProto]) -> None:
    opsets = {o.domain: o.version for o in graphs[name].opset_import}
    assert opsets.pop("") >= 23 and set(opsets) <= {"sanawm"}


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n.startswith(("denoise", "commit"))])
def test_project_nodes_have_bodies_of_standard_operators(name: str, graphs: dict[str, ModelProto]) -> None:
    model = graphs[name]
    own = Counter(node.op_type for node in model.graph.node if node.domain == "sanawm")
    assert own == NODES if name.startswith("denoise") else own["MainGDN"] == own["CameraGDN"] == 3
    assert {node.domain for node in model.graph.node} == {"", "sanawm"}
    bodies = {f.name: f for f in model.functions}
    assert set(bodies) == set(own) and all(f.domain == "sanawm" for f in model.functions)
    for body in bodies.values():
        assert {node.domain for node in body.node} == {""} and {o.domain for o in body.opset_import} == {""}
    for node in model.graph.node:
        if node.domain == "sanawm":
            assert len(node.input) == len(bodies[node.op_type].input) and len(node.output) == len(bodies[node.op_type].output)
    attributes = {a.name: onnx.helper.get_attribute_value(a) for n in model.graph.node if n.op_type == "CameraGDN" for a in n.attribute}
    assert attributes["frames"] == (4 if name.endswith("first") else 3) and attributes["carry"] == 1 and attributes["clamp"] == 0
    assert attributes["key_scale"] == pytest.approx(tiny_config().dit.key_scale, rel=1e-6)


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n.startswith("denoise")])
def test_convolutions_that_are_matrix_products_are_matrix_products(name: str, graphs: dict[str, ModelProto]) -> None:
    convolutions = [n for n in graphs[name].graph.node if n.op_type == "Conv"]
    groups = [a.i for n in convolutions for a in n.attribute if a.name == "group"]
    # Only the depthwise ones of the four feed-forward networks are left.
    assert groups == [2 * tiny_config().dit.glu_width] * 4


@pytest.mark.parametrize("name", PROGRAMS)
def test_weights_are_those_of_the_shared_file(name: str, graphs: dict[str, ModelProto], tiny_bundle: Path) -> None:
    part = WEIGHTS.get(name, "dit")
    path = tiny_bundle / "programs" / f"{part}.safetensors"
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    external = {t.name: {e.key: e.value for e in t.external_data} for t in graphs[name].graph.initializer if t.data_location == TensorProto.EXTERNAL}
    assert external
    for weight, where in external.items():
        begin, end = header[weight]["data_offsets"]
        assert where["location"] == path.name
        assert (int(where["offset"]), int(where["length"])) == (8 + size + begin, end - begin)
    # Of the weights only small ones stay inside.
    inside = [t for t in graphs[name].graph.initializer if t.data_location != TensorProto.EXTERNAL]
    assert all(len(t.raw_data) <= INLINE_BYTES for t in inside if t.name in header)


def test_the_graphs_share_one_copy_of_the_weights(tiny_bundle: Path) -> None:
    folder = tiny_bundle / "programs"
    assert {p.name for p in folder.glob("*.safetensors")} == {"text.safetensors", "vae.safetensors", "dit.safetensors"}
    weights = (folder / "dit.safetensors").stat().st_size
    graphs = [(folder / f"{n}.onnx").stat().st_size for n in PROGRAMS if n.startswith(("denoise", "commit"))]
    assert len(graphs) == 6 and sum(graphs) < weights / 2


def test_weight_files_are_the_checkpoints_tensors(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    from sanawm.model.checkpoint import open_checkpoint

    state = open_checkpoint(tiny_checkpoint).load_dit()
    with safe_open(str(tiny_bundle / "programs" / "dit.safetensors"), "pt") as file:
        stored = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    assert stored.keys() == state.keys()
    for name, tensor in state.items():
        expected = tensor
        if name.endswith("t_conv.weight"):
            # The temporal convolution as one product over [previous, current, next].
            expected = tensor[..., 0].permute(0, 2, 1)
        assert (stored[name].reshape(expected.shape) == expected).all(), name


def test_no_attribute_refers_outside_a_function(graphs: dict[str, ModelProto]) -> None:
    """Bodies are specialised to the graph: nothing in them depends on the node's attributes."""
    for model in graphs.values():
        for body in model.functions:
            assert not any(a.ref_attr_name for node in body.node for a in node.attribute)
            assert not any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for node in body.node for a in node.attribute)
