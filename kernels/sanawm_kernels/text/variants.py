"""Kernels that the text encoder launches."""

from __future__ import annotations

from collections.abc import Iterator

from sanawm_kernels.aot.spec import KernelVariant, ModelSizes
from sanawm_kernels.gemm import plans as gemm
from sanawm_kernels.gemm.plans import Finish, Operand
from sanawm_kernels.gemm.table import default_config
from sanawm_kernels.text import plans
from sanawm_kernels.tokenwise.variants import KIND


def variants(sizes: ModelSizes, target: int) -> list[KernelVariant]:
    """What stands between a layer's products, and the products, which are plain."""
    C, G, H, J, D = sizes.caption_channels, sizes.text_intermediate, sizes.text_heads, sizes.text_kv_heads, sizes.text_head_dim
    found = [plans.token_mask(), plans.embed_rows(KIND, C), plans.gelu_gated(KIND, G), plans.rotate_halves(KIND, H + J, D)]
    found += [plans.add_normed(KIND, C, keep) for keep in (True, False)]
    return [*found, plans.causal_attention(KIND, target, H, J, D), *_products(target, C, G, H * D, J * D)]


def _products(target: int, hidden: int, intermediate: int, queries: int, keys: int) -> Iterator[KernelVariant]:
    plain = Operand(KIND)
    shapes = ((queries + 2 * keys, hidden), (hidden, queries), (2 * intermediate, hidden), (hidden, intermediate))
    for columns, depth in shapes:
        yield gemm.gemm(plain, plain, columns, depth, 1, Finish(), default_config(target, KIND, columns))
