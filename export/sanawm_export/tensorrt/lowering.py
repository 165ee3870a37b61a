"""The project's own nodes as plugins: a block's two GDN nodes become one node that launches our kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from sanawm.errors import EngineError
from sanawm.programs import ITEM_SIZES
from sanawm_export.onnx.nodes import DOMAIN
from sanawm_export.tensorrt.gdn_launches import Placed, gdn_launches, output_operands, state_fields
from sanawm_export.tensorrt.kernels import Compiled
from sanawm_kernels.aot.spec import KernelVariant
from sanawm_kernels.gdn.plans import MAX_FRAMES, Problem
from sanawm_runtime.engines._trt_launch import LaunchList, Operand
from sanawm_runtime.engines._trt_plugin import CODE_FIELD, DESCRIPTION_FIELD, NAME, NAMESPACE, VERSION

GDN = Literal["plugin", "matmul"]
FUSED = ("MainGDN", "CameraGDN")

_KINDS = {ir.DataType.BFLOAT16: "bf16", ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16"}
_DTYPES = {ir.DataType.BFLOAT16: "bfloat16", ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}
_IR_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
# Inputs of the nodes after q, k, v and the tokens' gate logits: what both share first.
_GATES = ("A_log", "dt_bias")
_MAIN = ("main_conv", "main_q_norm", "main_k_norm", "cos", "sin")
_CAMERA = ("camera_conv", "camera_q_norm", "camera_k_norm", "rays", "rays_inverse", "camera_cos", "camera_sin")

Compile = Callable[[Sequence[KernelVariant]], Sequence[Compiled]]


def fuse_gdn(model: ir.Model, capability: str, compile_variants: Compile) -> list[LaunchList]:
    """Replace every pair of MainGDN and CameraGDN nodes of one block by a plugin node carrying kernels for `capability`.

    Returns the launch lists in graph order. Raises EngineError for a graph or target that the kernels do not serve.
    """
    made = []
    for main, camera in list(_pairs(model.graph)):
        made.append(_fuse(model.graph, main, camera, capability, compile_variants))
    if made:
        model.opset_imports[NAMESPACE] = int(VERSION)
        model.graph.sort()
    return made


def _pairs(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
    waiting: dict[tuple[ir.Value | None, ...], ir.Node] = {}
    for node in graph:
        if node.domain != DOMAIN or node.op_type not in FUSED:
            continue
        gates = tuple(node.inputs[3:7])
        other = waiting.pop(gates, None)
        if other is None:
            waiting[gates] = node
        else:
            yield (other, node) if other.op_type == "MainGDN" else (node, other)
    if waiting:
        raise EngineError(f"{graph.name}: {next(iter(waiting.values())).name} has no partner of the other branch; build with --gdn matmul")


def _fuse(graph: ir.Graph, main: ir.Node, camera: ir.Node, capability: str, compile_variants: Compile) -> LaunchList:
    problem = _problem(main, camera)
    operands = _Operands()
    for name, node in (("main", main), ("camera", camera)):
        operands.add_projections(name, node.inputs[:3])
    operands.add_part("beta", main.inputs[3])
    operands.add_part("decay", main.inputs[4])
    for name, value in zip((*_GATES, *_MAIN), main.inputs[5:12], strict=True):
        operands.add(name, value)
    for name, value in zip(_CAMERA, camera.inputs[7:14], strict=True):
        operands.add(name, value)
    for name, value in _past(problem, main, camera).items():
        operands.add(name, value)
    launches = gdn_launches(problem, capability, operands.described(), operands.places, compile_variants)
    text, code = launches.to_fields()
    node = ir.node(
        NAME,
        operands.values,
        attributes={
            "plugin_version": VERSION,
            "plugin_namespace": NAMESPACE,
            DESCRIPTION_FIELD: ir.tensor(np.frombuffer(text.encode(), np.int8)),
            CODE_FIELD: ir.tensor(np.frombuffer(code, np.int8)),
        },
        domain=NAMESPACE,
        num_outputs=len(launches.outputs),
        name=f"{main.name}__fused",
    )
    graph.insert_before(main, node)
    old = _results(main, camera)
    for (field, operand), value in zip(output_operands(problem).items(), node.outputs, strict=True):
        replaced = old[field]
        value.type, value.shape = ir.TensorType(_IR_DTYPES[operand.dtype]), ir.Shape(operand.shape)
        value.name, replaced.name = replaced.name, f"{replaced.name}__replaced"
        replaced.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove([main, camera], safe=True)
    return launches


def _results(main: ir.Node, camera: ir.Node) -> dict[str, ir.Value]:
    found = {"main_out": main.outputs[0], "camera_out": camera.outputs[0]}
    found |= dict(zip(("s", "z", "k_tail"), main.outputs[1:], strict=True))
    return found | dict(zip(("s_cam", "cam_tail"), camera.outputs[1:], strict=True))


def _past(problem: Problem, main: ir.Node, camera: ir.Node) -> dict[str, ir.Value | None]:
    if not problem.has_state:
        return {}
    found = dict(zip(("s", "z", "k_tail"), main.inputs[12:], strict=True)) | dict(zip(("s_cam", "cam_tail"), camera.inputs[14:], strict=False))
    return {field: found[field] for field in state_fields(problem)}


def _problem(main: ir.Node, camera: ir.Node) -> Problem:
    q, decay, A_log, conv, head = main.inputs[0], main.inputs[4], main.inputs[5], main.inputs[7], main.inputs[10]
    frames = main.attributes["frames"].as_int()
    B, N, C = _shape(q)
    if frames > MAX_FRAMES:
        raise EngineError(f"the GDN kernels take chunks of up to {MAX_FRAMES} frames, found {frames}; build with --gdn matmul")
    H = _shape(decay)[-1]
    states = [*main.outputs[1:], *camera.outputs[1:]]
    if _shape(head)[-1] * 2 != C // H:
        raise EngineError(f"{main.name}: rotary tables of width {_shape(head)[-1]} do not fit heads of width {C // H}; report this")
    return Problem(
        batch=B, heads=H, head_dim=C // H, frames=frames, tokens=N // frames, key_scale=main.attributes["key_scale"].as_float(),
        kind=_kind(q), weight_kind=_kind(conv), gate_kind=_kind(A_log), precision="bf16" if _kind(q) == "bf16" else "ieee",
        has_state=len(main.inputs) > 12, commit=any(s.uses() or s.is_graph_output() for s in states),
        clamp=bool(camera.attributes["clamp"].as_int()), camera_carry=bool(camera.attributes["carry"].as_int()),
    )  # fmt: skip


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    if value is None or value.shape is None:
        raise EngineError(f"no shape is known for {value.name if value is not None else 'an input'}; export the graph again")
    return tuple(int(size) for size in value.shape.numpy())


def _kind(value: ir.Value | None) -> str:
    if value is None or value.dtype not in _KINDS:
        raise EngineError(f"the GDN kernels take {', '.join(_KINDS.values())}, found {value.dtype if value is not None else 'nothing'}")
    return _KINDS[value.dtype]


def _part_of(value: ir.Value | None) -> tuple[ir.Value, int]:
    """The tensor whose last axis a value is a part of by splits, and the first channel of the part."""
    assert value is not None
    node = value.producer()
    if node is None or node.op_type != "Split" or node.attributes.get_int("axis", 0) not in (-1, len(_shape(value)) - 1):
        return value, 0
    before = sum(_shape(other)[-1] for other in node.outputs[: list(node.outputs).index(value)])
    whole, channel = _part_of(node.inputs[0])
    return whole, channel + before


def _item_size(value: ir.Value) -> int:
    return ITEM_SIZES[_DTYPES[value.dtype]] if value.dtype in _DTYPES else 0


class _Operands:
    """The plugin's inputs, each once, and where the kernels' arguments lie in them."""

    def __init__(self) -> None:
        self.values: list[ir.Value] = []
        self.places: dict[str, Placed] = {}

    def add(self, name: str, value: ir.Value | None, offset: int = 0, row: int = 0) -> None:
        assert value is not None
        index = next((i for i, known in enumerate(self.values) if known is value), len(self.values))
        if index == len(self.values):
            self.values.append(value)
        self.places[name] = Placed(index, offset, row)

    def add_projections(self, branch: str, qkv: Sequence[ir.Value | None]) -> None:
        """q, k and v; the parts of a larger projection are read where they are instead of being split, if all lie in the same."""
        found = [_part_of(value) for value in qkv]
        if len({id(whole) for whole, _ in found}) > 1:
            found = [(value, 0) for value in qkv if value is not None]
        for name, (whole, channel) in zip("qkv", found, strict=True):
            self.add(f"{branch}_{name}", whole, channel * _item_size(whole), _shape(whole)[-1])

    def add_part(self, name: str, value: ir.Value | None) -> None:
        """A tensor whose rows may lie in those of a larger one."""
        whole, channel = _part_of(value)
        self.add(name, whole, channel * _item_size(whole), _shape(whole)[-1])

    def described(self) -> list[Operand]:
        found = []
        for value in self.values:
            if value.dtype not in _DTYPES:
                raise EngineError(f"the plugin takes no {value.dtype} ({value.name}); build with --gdn matmul")
            found.append(Operand(_DTYPES[value.dtype], _shape(value)))
        return found
