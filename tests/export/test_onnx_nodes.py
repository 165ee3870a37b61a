"""The project's operations as nodes: bodies that compute the definition to its last constant, and what a graph cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sanawm.programs import Program, TensorSpec
from sanawm_export.onnx.nodes import GraphOps
from sanawm_export.onnx.trace import trace
from sanawm_export.onnx.weights import link_weights, write_weights
from sanawm_kernels import ops
from sanawm_kernels.gdn.naive import Gates
from sanawm_runtime.engines.onnxruntime import session_options

T, S, H, D = 3, 4, 2, 8
N, C = T * S, H * D
MAIN = {
    "q": (1, N, C), "k": (1, N, C), "v": (1, N, C), "beta": (1, N, H), "decay": (1, N, H), "A_log": (H,), "dt_bias": (H,),
    "conv": (C, 4), "q_norm": (C,), "k_norm": (C,), "cos": (N, D // 2), "sin": (N, D // 2),
}  # fmt: skip
STATE = {"s": (1, H, D, D), "z": (1, H, D), "tail": (1, 3, S, C)}


class Call(nn.Module):
    """A fused operation on flat inputs."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, *tensors: Tensor) -> Any:
        return self.compute(*tensors)


def main_gdn(*t: Tensor) -> tuple[Tensor, ...]:
    state = t[12:] or None
    return ops.main_gdn(*t[:3], Gates(*t[3:7]), *t[7:12], chunks=(T,), key_scale=0.1, state=state)


def program(inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]]) -> Program:
    sides = [tuple(TensorSpec(name, "float32", shape) for name, shape in side.items()) for side in (inputs, outputs)]
    return Program("probe", *sides)


MAIN_OUTPUTS = {"out": (1, N, C), "next_s": STATE["s"], "next_z": STATE["z"], "next_tail": STATE["tail"]}


@pytest.fixture(scope="module", params=["start", "carried"])
def main_session(request: pytest.FixtureRequest) -> onnxruntime.InferenceSession:
    """MainGDN alone, in ONNX Runtime, which knows nothing but its body."""
    inputs = MAIN | (STATE if request.param == "carried" else {})
    model = trace(program(inputs, MAIN_OUTPUTS), Call(main_gdn))
    assert [node.op_type for node in model.graph] == ["MainGDN"] and [f.name for f in model.functions.values()] == ["MainGDN"]
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), session_options(), providers=["CPUExecutionProvider"])


def values(session: onnxruntime.InferenceSession, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in session.get_inputs()}


def both(session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    with torch.no_grad():
        expected = main_gdn(*(torch.from_numpy(feeds[t.name]).double() for t in session.get_inputs()))
    return session.run(None, feeds), [x.numpy() for x in expected]


def test_the_body_is_the_definition(main_session: onnxruntime.InferenceSession) -> None:
    feeds = values(main_session)
    if "z" in feeds:
        feeds["z"] = np.abs(feeds["z"]) + 1
    for found, expected in zip(*both(main_session, feeds), strict=True):
        # float32 against float64 on sums of at most thirty terms; the quotient of two of them.
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


def test_a_query_without_positive_channels_reads_zero(main_session: onnxruntime.InferenceSession) -> None:
    feeds = values(main_session)
    feeds["q"], feeds["q_norm"] = -np.abs(feeds["q"]), np.abs(feeds["q_norm"])
    found, _ = both(main_session, feeds)
    # Zero over the denominator's constant, not zero over zero.
    assert not found[0].any() and np.abs(found[1]).max() > 0


def test_the_denominators_constant_is_kept(main_session: onnxruntime.InferenceSession) -> None:
    """Queries so small that the constant is as large as the sum it is added to: without it results would be twice as large and more."""
    feeds = values(main_session)
    feeds["q_norm"] = np.full(C, 3e-8, np.float32)
    if "z" in feeds:
        feeds["z"] = np.abs(feeds["z"])
    found, expected = both(main_session, feeds)
    without = both_without_constant(feeds)
    scale = np.abs(expected[0]).max()
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4 * scale, rtol=0)
    assert np.abs(without - expected[0]).max() > 0.1 * scale


def both_without_constant(feeds: dict[str, np.ndarray]) -> np.ndarray:
    from unittest import mock

    with torch.no_grad(), mock.patch("sanawm_kernels.gdn.naive.DENOMINATOR_EPS", 0.0):
        return main_gdn(*(torch.from_numpy(x).double() for x in feeds.values()))[0].numpy()


def test_one_signature_a_node_and_graph() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor, y: Tensor, P: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            return ops.ucpe(x, P, cos, sin), ops.ucpe(y, P, cos, sin)

    inputs = {"x": (1, N, H, D), "y": (1, N, H + 1, D), "P": (1, N, 4, 4), "cos": (N, D // 4), "sin": (N, D // 4)}
    with pytest.raises(Exception, match="UCPE is used with two signatures in one graph"):
        trace(program(inputs, {"a": (1, N, H, D), "b": (1, N, H + 1, D)}), Twice())


def test_a_graph_holds_one_chunk() -> None:
    graph = GraphOps()
    q, k, v, *rest = (torch.zeros(shape) for shape in MAIN.values())
    conv, q_norm, k_norm, cos, sin = rest[4:]
    with pytest.raises(ValueError, match="a graph holds one chunk, found 2; export each chunk kind as its own program"):
        graph.main_gdn(q, k, v, Gates(*rest[:4]), conv, q_norm, k_norm, cos, sin, chunks=(2, 1), key_scale=0.1)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [({"y": (1, 3)}, r"probe: output y should be float32\(1, 3\), the graph has y float\(1, 2\)"), ({"y": (1, 2)}, None)],
)
def test_a_graph_must_have_its_signature(outputs: dict[str, tuple[int, ...]], message: str | None) -> None:
    module = Call(lambda x: (x * 2,))
    if message is None:
        assert trace(program({"x": (1, 2)}, outputs), module).graph.name == "probe"
        return
    with pytest.raises(ValueError, match=message):
        trace(program({"x": (1, 2)}, outputs), module)


class Weighted(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.inner = nn.Linear(64, rows, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.inner(x),)


def test_weights_must_be_in_the_file(tmp_path: Path) -> None:
    model = trace(program({"x": (1, 64)}, {"y": (1, 32)}), Weighted(32))
    write_weights(tmp_path / "other.safetensors", {"something.weight": torch.zeros(32, 64)})
    with pytest.raises(ValueError, match=r"other\.safetensors does not hold the weight inner\.weight"):
        link_weights(model, tmp_path / "other.safetensors", ("inner.",))


def test_weights_must_have_the_graphs_shape(tmp_path: Path) -> None:
    model = trace(program({"x": (1, 64)}, {"y": (1, 32)}), Weighted(32))
    write_weights(tmp_path / "other.safetensors", {"weight": torch.zeros(64, 32)})
    with pytest.raises(ValueError, match=r"other\.safetensors: weight is F32\[64, 32\] there and FLOAT"):
        link_weights(model, tmp_path / "other.safetensors", ("inner.",))


def test_linked_weights_are_the_modules(tmp_path: Path) -> None:
    module = Weighted(32)
    model = trace(program({"x": (1, 64)}, {"y": (1, 32)}), module)
    write_weights(tmp_path / "w.safetensors", {"weight": module.inner.weight})
    link_weights(model, tmp_path / "w.safetensors", ("inner.",))
    (tmp_path / "g.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    assert (tmp_path / "g.onnx").stat().st_size < 1000
    session = onnxruntime.InferenceSession(str(tmp_path / "g.onnx"), session_options(), providers=["CPUExecutionProvider"])
    x = torch.randn(1, 64)
    (found,) = session.run(None, {"x": x.numpy()})
    # One product of 64 terms in float32.
    np.testing.assert_allclose(found, module(x)[0].detach().numpy(), atol=1e-6)
