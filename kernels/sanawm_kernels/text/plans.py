"""How the text encoder's kernels are specialised. Nothing here needs torch or triton."""

from __future__ import annotations

from functools import cache

from sanawm_kernels.aot.spec import KernelVariant
from sanawm_kernels.tokenwise.block_plans import power_of_two
from sanawm_kernels.tokenwise.plans import arguments, pointer, stride
from sanawm_kernels.tuning import Row, choose

KERNELS = "sanawm_kernels.text.kernels"
FLAT = 1024
# What Gemma 2 fixes: the norms' epsilon, the cap of the attention's logits, the base of the rotary angles, the window of every other layer.
NORM_EPS, LOGIT_CAP, ROPE_THETA, WINDOW = 1e-6, 50.0, 10000.0, 4096

_DATE = "2026-11-23"
_ALL = (80, 86, 89, 90, 100, 103, 120, 121)
_INSPECTED = "not timed: chosen from registers, spills and shared memory of the compiled code"
TABLE: tuple[Row, ...] = (
    Row("causal", (0,), {"queries": 16, "keys": 16}, 4, 1, _DATE, "small enough for tests, with tails at small sizes"),
    Row("causal", _ALL, {"queries": 64, "keys": 32}, 8, 2, _DATE, _INSPECTED, {"kind": "bf16"}),
    Row("causal", _ALL, {"queries": 16, "keys": 16}, 4, 1, _DATE, "float32 is for tests on a GPU", {"kind": "fp32"}),
)


def _row_warps(channels: int) -> int:
    return 8 if channels >= 1024 else 1


@cache
def embed_rows(kind: str, channels: int) -> KernelVariant:
    """Scaled embedding rows and their norm."""
    return KernelVariant(
        name=f"text.embed.c{channels}.{kind}", kernel=f"{KERNELS}:embed_rows",
        signature={
            "ids": "*i64:16", "table": f"*{kind}:16", "gain": "*fp32:16", "updated": f"*{kind}:16", "out": f"*{kind}:16", "scale": "fp32",
        },
        constexprs={"C": channels, "P": power_of_two(channels, 16), "EPS": NORM_EPS},
        grid=("ROWS", "1", "1"), grid_sizes=("ROWS",), num_warps=_row_warps(channels), num_stages=1,
    )  # fmt: skip


@cache
def add_normed(kind: str, channels: int, keep: bool) -> KernelVariant:
    """Residual sum of a normed branch, and its norm; `keep` stores the sum."""
    signature, absent = arguments({
        "x": pointer(kind), "branch": pointer(kind), "post": "*fp32:16", "pre": "*fp32:16", "updated": pointer(kind if keep else None),
        "out": pointer(kind),
    })  # fmt: skip
    return KernelVariant(
        name=f"text.add_normed.c{channels}.{'' if keep else 'last.'}{kind}", kernel=f"{KERNELS}:add_normed", signature=signature,
        constexprs=absent | {"C": channels, "P": power_of_two(channels, 16), "EPS": NORM_EPS},
        grid=("ROWS", "1", "1"), grid_sizes=("ROWS",), num_warps=_row_warps(channels), num_stages=1, hot=True,
    )  # fmt: skip


@cache
def rotate_halves(kind: str, heads: int, width: int) -> KernelVariant:
    """Rotary embedding of `heads` heads that lie beside each other."""
    return KernelVariant(
        name=f"text.rotate_halves.h{heads}.d{width}.{kind}", kernel=f"{KERNELS}:rotate_halves",
        signature={"x": f"*{kind}:16", "x_row": stride(heads * width), "frequencies": "*fp32:16", "out": f"*{kind}:16", "L": "i32"},
        constexprs={"HEADS": heads, "D": width, "P": power_of_two(width // 2), "R": 8},
        grid=("cdiv(L, R)", "HEADS", "1"), num_warps=4, num_stages=1,
    )  # fmt: skip


@cache
def causal_attention(kind: str, target: int, heads: int, key_heads: int, width: int) -> KernelVariant:
    """Causal attention with capped logits for compute capability `target`."""
    tuned = choose(TABLE, "causal", target, kind=kind)
    row, key_row = stride(heads * width), stride(key_heads * width)
    return KernelVariant(
        name=f"text.causal_attention.h{heads}.j{key_heads}.d{width}.{kind}", kernel=f"{KERNELS}:causal_attention",
        signature={
            "q": f"*{kind}:16", "q_row": row, "k": f"*{kind}:16", "k_row": key_row, "v": f"*{kind}:16", "v_row": key_row,
            "mask": "*i64:16", "out": f"*{kind}:16", "L": "i32", "softmax_scale": "fp32",
        },
        constexprs={
            "HEADS": heads, "GROUP": heads // key_heads, "D": width, "P": power_of_two(width, 16), "BM": tuned.settings["queries"],
            "BN": tuned.settings["keys"], "CAP": LOGIT_CAP, "PRECISION": "ieee",
        },
        grid=("cdiv(L, BM)", "HEADS", "1"), num_warps=tuned.num_warps, num_stages=tuned.num_stages, hot=True,
    )  # fmt: skip


@cache
def gelu_gated(kind: str, gated: int) -> KernelVariant:
    """Gated linear unit with tanh GELU; `gated` is half the input's width."""
    return KernelVariant(
        name=f"text.gelu_gated.g{gated}.{kind}", kernel=f"{KERNELS}:gelu_gated",
        signature={"x": f"*{kind}:16", "out": f"*{kind}:16", "SIZE": "i32"},
        constexprs={"G": gated, "B": FLAT}, grid=("cdiv(SIZE, B)", "1", "1"), num_warps=4, num_stages=1,
    )  # fmt: skip


@cache
def token_mask() -> KernelVariant:
    """Mask of the selected tokens."""
    return KernelVariant(
        name="text.token_mask", kernel=f"{KERNELS}:token_mask", signature={"mask": "*i64:16", "out": "*u8:16", "L": "i32", "K": "i32"},
        constexprs={"B": 256}, grid=("cdiv(K, B)", "1", "1"), num_warps=4, num_stages=1,
    )  # fmt: skip
