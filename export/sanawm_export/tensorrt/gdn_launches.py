"""The fused gated delta network of one block as a launch list.

Shapes: N tokens of the chunk, C channels, H heads, D head width, T frames, S tokens a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sanawm.errors import EngineError
from sanawm_export.tensorrt.kernels import Compiled, target_number
from sanawm_kernels.aot.spec import KernelVariant
from sanawm_kernels.gdn.plans import Problem, plan, row
from sanawm_kernels.gdn.workspace import scratch
from sanawm_runtime.engines._trt_launch import Argument, Launch, LaunchList, Operand, aligned_offsets

DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
_STATE = ("s", "z", "k_tail", "s_cam", "cam_tail")
# The kernels' names of state tensors by the model's.
_KERNEL_STATE = {"s": "main_state", "z": "z", "s_cam": "camera_state", "k_tail": "main_tail", "cam_tail": "camera_tail"}


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies: operand number, byte offset in it, and elements from one token's row to the next."""

    index: int
    offset: int = 0
    row: int = 0


def state_fields(problem: Problem) -> tuple[str, ...]:
    """State tensors that cross the node's border. A camera convolution without carried context has no tail."""
    return tuple(field for field in _STATE if field != "cam_tail" or problem.camera_carry)


def state_operands(problem: Problem) -> dict[str, Operand]:
    """dtype and shape of each state tensor."""
    B, H, D, kind = problem.batch, problem.heads, problem.head_dim, DTYPES[problem.kind]
    tail = Operand(kind, (B, 3, problem.tokens, problem.channels))
    square = Operand("float32", (B, H, D, D))
    found = {"s": square, "z": Operand("float32", (B, H, D)), "k_tail": tail, "s_cam": square, "cam_tail": tail}
    return {field: found[field] for field in state_fields(problem)}


def output_operands(problem: Problem) -> dict[str, Operand]:
    """The node's outputs by name: both branches' results, then the new state where it is committed."""
    result = Operand(DTYPES[problem.kind], (problem.batch, problem.frames * problem.tokens, problem.channels))
    return {"main_out": result, "camera_out": result, **(state_operands(problem) if problem.commit else {})}


def gdn_launches(
    problem: Problem,
    capability: str,
    inputs: Sequence[Operand],
    places: Mapping[str, Placed],
    compile_variants: Callable[[Sequence[KernelVariant]], Sequence[Compiled]],
) -> LaunchList:
    """Both branches of a block for one target.

    `places` says where each input lies among the `inputs`, by the kernels' argument name without phase (`main_q`, `camera_conv`, `rays`,
    `beta`, `s`, `k_tail`, ...). Raises EngineError when a kernel does not compile.
    """
    target = target_number(capability)
    variants = plan(problem, target)
    settings = row(problem, "summarize", target).settings
    buffers = scratch(problem.batch, problem.heads, problem.frames, problem.tokens, problem.head_dim, problem.precision, settings)
    # A tail that the model drops still gets a place to be read from and written to.
    tail = Operand(DTYPES[problem.kind], (problem.batch, 3, problem.tokens, problem.channels))
    sizes = {name: Operand(dtype, shape).nbytes for name, (shape, dtype) in buffers.items()} | {"dropped_tail": tail.nbytes}
    offsets, workspace = aligned_offsets(list(sizes.values()))
    scratch_at = {name: Argument("workspace", offset) for name, offset in zip(sizes, offsets, strict=True)}
    arguments = scratch_at | _inputs(problem, places) | _strides(problem, places) | _state(problem, places, scratch_at["dropped_tail"])
    compiled = compile_variants(variants)
    integers = {name: int(argument.value) for name, argument in arguments.items() if argument.source == "i64"}
    launches = []
    for number, made in enumerate(compiled):
        given = tuple(_typed(name, arguments[name], made.variant.signature[name]) for name in made.arguments)
        launches.append(Launch(number, made.variant.launch_grid(integers), given))
    name = f"gdn.{problem.frames}f" + (".commit" if problem.commit else "") + ("" if problem.has_state else ".first")
    outputs = tuple(output_operands(problem).values())
    return LaunchList(name, capability, tuple(inputs), outputs, workspace, tuple(made.kernel for made in compiled), tuple(launches))


def _typed(name: str, argument: Argument, kind: str) -> Argument:
    """An argument with the width its kernel's signature gives it, once the alignment promised there holds."""
    word, _, promise = kind.partition(":")
    if promise and argument.value % int(promise):
        raise EngineError(f"the GDN kernels need {name} to be a multiple of {promise}, found {argument.value}; build with --gdn matmul")
    return Argument(word, argument.value) if argument.source == "i64" else argument  # type: ignore[arg-type]


def _inputs(problem: Problem, places: Mapping[str, Placed]) -> dict[str, Argument]:
    found = {name: Argument("input", place.offset, place.index) for name, place in places.items()}
    names = list(output_operands(problem))
    return found | {name: Argument("output", 0, names.index(name)) for name in ("main_out", "camera_out")}


def _strides(problem: Problem, places: Mapping[str, Placed]) -> dict[str, Argument]:
    """Distances in elements between rows and between batches."""
    tokens = problem.frames * problem.tokens
    rows = {
        "main": places["main_q"].row, "camera": places["camera_q"].row, "main_out": problem.channels, "camera_out": problem.channels,
        "beta": places["beta"].row, "decay": places["decay"].row,
    }  # fmt: skip
    found = {"rays_batch": 0 if problem.batch == 1 else tokens * 16}
    for name, distance in rows.items():
        found |= {f"{name}_row": distance, f"{name}_batch": distance * tokens}
    return {name: Argument("i64", value) for name, value in found.items()}


def _state(problem: Problem, places: Mapping[str, Placed], dropped: Argument) -> dict[str, Argument]:
    outputs = list(output_operands(problem))
    found: dict[str, Argument] = {}
    for field, name in _KERNEL_STATE.items():
        old = Argument("input", places[field].offset, places[field].index) if field in places else dropped
        found[f"{name}_in"] = old
        found[f"{name}_out"] = Argument("output", 0, outputs.index(field)) if field in outputs else dropped
    return found
