"""Random inputs of the kernels that `tune_kernels` tunes one by one, at the official size, with their exact results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# The official model's chunk: 3 frames of 22 x 40 tokens, 20 heads of 112, 300 text tokens.
T, GRID, H, D, G, TEXT = 3, (22, 40), 20, 112, 6720, 300
S, C = GRID[0] * GRID[1], H * D
N = T * S
# Partial sums of squares a row that the product before the cross-attention hands over.
PARTS = 18
EPS = 1e-5
DEVICE = "cuda"

# Arguments of a launch, sizes that its grid needs, and the exact results by the name of the argument that they are written to.
Made = tuple[dict[str, Any], dict[str, int], dict[str, Callable[[], Any]]]


def _rand(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, device=DEVICE).bfloat16()


def _parts(count: int) -> list[Any]:
    """Slices of one merged projection."""
    wide = _rand(N, count * C + 64)
    return [wide[:, i * C : (i + 1) * C] for i in range(count)]


def _tables(pairs: int) -> dict[str, Any]:
    import torch

    angle = torch.randn(N, pairs, device=DEVICE)
    return {"cos": angle.cos(), "sin": angle.sin()}


def _depthwise() -> Made:
    from sanawm_kernels.tokenwise import naive

    x, taps, bias, out = _rand(N, 2 * G), _rand(9, 2 * G), _rand(2 * G), _rand(N, G)
    arguments = {"x": x, "x_row": 2 * G, "taps": taps, "bias": bias, "out": out}
    return arguments, {"FRAMES": T}, {"out": lambda: naive.depthwise_glu(x[None].float(), taps.float(), bias.float(), GRID).plain}


def _rope() -> Made:
    from sanawm_kernels.tokenwise import naive

    (q, k), norms, tables = _parts(2), (_rand(C), _rand(C)), _tables(D // 2)
    outputs = {"q_out": _rand(N, C), "k_out": _rand(N, C)}
    arguments = {"q": q, "q_row": q.stride(0), "k": k, "k_row": k.stride(0), "q_norm": norms[0], "k_norm": norms[1], **tables, **outputs, "ROWS": N}

    def exact() -> Any:
        return naive.rope_heads(q[None].double(), k[None].double(), norms[0].double(), norms[1].double(), tables["cos"], tables["sin"], H, EPS)

    return arguments, {}, {"q_out": lambda: exact()[0], "k_out": lambda: exact()[1]}


def _ucpe() -> Made:
    import torch

    from sanawm_kernels.tokenwise import naive

    parts, norms, tables = _parts(3), (_rand(C), _rand(C)), _tables(D // 4)
    matrix = torch.randn(1, N, 4, 4, device=DEVICE)
    rays = {"rays": matrix, "rays_inverse": torch.linalg.inv(matrix).contiguous()}
    arguments: dict[str, Any] = {"q_norm": norms[0], "k_norm": norms[1], **rays, **tables, "ROWS": N}
    for name, x in zip("qkv", parts):
        arguments |= {name: x, f"{name}_row": x.stride(0), f"{name}_out": _rand(N, C)}

    def exact() -> Any:
        q, k, v = (x[None].double() for x in parts)
        return naive.ucpe_heads(q, k, v, norms[0].double(), norms[1].double(), rays["rays"], rays["rays_inverse"], tables["cos"], tables["sin"], H, EPS)

    return arguments, {}, {"q_out": lambda: exact()[0], "k_out": lambda: exact()[1], "v_out": lambda: exact()[2]}


def _inverse_ucpe() -> Made:
    import torch

    from sanawm_kernels.tokenwise import naive

    x, rays, tables = _rand(N, C), torch.randn(1, N, 4, 4, device=DEVICE), _tables(D // 4)
    arguments = {"x": x, "x_row": C, "rays": rays, **tables, "out": _rand(N, C), "ROWS": N}
    return arguments, {}, {"out": lambda: naive.inverse_ucpe(x.view(1, N, H, D).double(), rays, tables["cos"], tables["sin"])}


def _transpose() -> Made:
    import torch

    from sanawm_kernels.tokenwise import naive

    v, scale = _rand(N, C), torch.tensor(0.02, device=DEVICE)
    out = torch.empty(1, H, D, N, dtype=torch.float8_e4m3fn, device=DEVICE)
    arguments = {"v": v, "v_row": C, "v_batch": N * C, "scale": scale, "out": out, "TOKENS": N, "out_row": N}
    return arguments, {"BATCH": 1}, {"out": lambda: naive.fp8_values_transposed(v.view(1, N, H, D), scale).float()}


def _modulate(quantized: bool) -> Made:
    import torch

    from sanawm_kernels.tokenwise import naive

    x, shift, scale = _rand(N, C), _rand(T, C), _rand(T, C)
    arguments = {"x": x, "x_row": C, "shift": shift, "shift_row": C, "scale": scale, "scale_row": C}

    def exact() -> Any:
        return naive.modulate(x[None].double(), shift[None].double(), scale[None].double()).plain

    if not quantized:
        return arguments | {"out": _rand(N, C)}, {"ROWS": N}, {"out": exact}
    codes, scales = torch.empty(N, C, dtype=torch.float8_e4m3fn, device=DEVICE), torch.empty(N, device=DEVICE)
    return arguments | {"codes": codes, "scales": scales}, {"ROWS": N}, {"scales": lambda: exact().bfloat16().float().abs().amax(-1) / 448}


def _cross() -> Made:
    import torch

    from sanawm_kernels.attention import naive

    q, k, v, norm = _rand(N, C), _rand(1, TEXT, H, D), _rand(1, TEXT, H, D), _rand(C)
    mask = (torch.arange(TEXT, device=DEVICE) < TEXT - TEXT // 8)[None]
    squares = torch.zeros(N, PARTS, device=DEVICE)
    squares[:, 0] = q.float().square().sum(1)
    arguments = {
        "q": q, "q_row": C, "q_batch": N * C, "k": k, "v": v, "k_row": C, "k_batch": TEXT * C, "v_row": C, "v_batch": TEXT * C,
        "mask": mask.view(torch.uint8), "q_norm": norm, "squares": squares, "out": _rand(N, C), "N": N, "L": TEXT, "softmax_scale": D**-0.5,
    }  # fmt: skip
    exact = lambda: naive.cross_attention(q[None].double(), k.double(), v.double(), mask, norm.double(), EPS).plain  # noqa: E731
    return arguments, {"BATCH": 1}, {"out": exact}


SINGLE: dict[str, Callable[[], Made]] = {
    "depthwise": _depthwise, "rope": _rope, "ucpe": _ucpe, "inverse_ucpe": _inverse_ucpe, "transpose": _transpose,
    "modulate": lambda: _modulate(False), "fp8_rows": lambda: _modulate(True), "cross": _cross,
}  # fmt: skip
