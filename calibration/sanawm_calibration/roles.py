"""Roles of the transformer's matrix products: one table from module paths to what a product does and how precise it has to be.

Everything that selects layers selects them by role, so a layer that is not in the table is an error and never silently quantized or skipped.
Tiers: A carries 4 bits, B keeps 8 (the camera path and the temporal convolution, whose errors are lost camera following and flicker), C stays in
bfloat16 (embedders, gates, the final layer). Sources of the tiers: the layer sets of NVIDIA's SANA code and of SANA-Streaming's search.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from sanawm.config import DiTConfig
from sanawm.keys import dit_tensors
from sanawm_calibration.errors import RecipeError

Tier = Literal["A", "B", "C"]
# How often a product is evaluated: in every forward, once a chunk, or once a prompt.
Program = Literal["forward", "camera", "prompt"]


@dataclass(frozen=True)
class Role:
    """What a matrix product is for.

    `pattern` matches whole module paths. Products of one `source` read the same tensor, within a block or, if it is `shared`, in all blocks.
    """

    name: str
    pattern: str
    tier: Tier
    source: str
    program: Program = "forward"
    shared: bool = False


_BLOCK = r"blocks\.(\d+)\."

ROLES = (
    Role("qkv", _BLOCK + r"attn\.qkv", "A", "attention"),
    Role("output_gate", _BLOCK + r"attn\.output_gate", "A", "attention"),
    Role("proj", _BLOCK + r"attn\.proj", "A", "attention_out"),
    Role("cross_q", _BLOCK + r"cross_attn\.q_linear", "A", "residual"),
    Role("cross_proj", _BLOCK + r"cross_attn\.proj", "A", "cross_out"),
    Role("ffn_in", _BLOCK + r"mlp\.inverted_conv\.conv", "A", "ffn"),
    Role("ffn_out", _BLOCK + r"mlp\.point_conv\.conv", "A", "glu"),
    Role("ffn_time", _BLOCK + r"mlp\.t_conv", "B", "frames"),
    Role("cam_qkv", _BLOCK + r"attn\.[qkv]_proj_cam", "B", "attention"),
    Role("cam_out", _BLOCK + r"attn\.out_proj_cam", "B", "camera_out"),
    Role("plucker", _BLOCK + r"plucker_proj", "B", "plucker", "camera", shared=True),
    Role("cross_kv", _BLOCK + r"cross_attn\.kv_linear", "B", "text", "prompt", shared=True),
    Role("beta", _BLOCK + r"attn\.beta_proj", "C", "attention"),
    Role("decay", _BLOCK + r"attn\.gate_proj", "C", "frame_mean"),
    Role("embedder", r"x_embedder\.proj", "C", "latents"),
    Role("camera_embedder", r"(plucker|raymap)_embedder\.proj", "C", "camera", "camera"),
    Role("text_embedder", r"y_embedder\.y_proj\.fc[12]", "C", "caption", "prompt"),
    Role("time_embedder", r"t_embedder\.mlp\.[02]", "C", "timestep"),
    Role("modulation", r"t_block\.1", "C", "timestep"),
    Role("final", r"final_layer\.linear", "C", "final"),
)
ROLE_NAMES = tuple(role.name for role in ROLES)
_COMPILED = tuple((re.compile(role.pattern), role) for role in ROLES)
# Weights that are no matrix products: short and depthwise convolutions, tables.
_NOT_PRODUCTS = re.compile(r".*(conv_k|conv_k_cam|depth_conv\.conv|scale_shift_table)$")


@dataclass(frozen=True)
class Layer:
    """A matrix product y = x W^T: `name` is its module's path, W is (rows, columns)."""

    name: str
    role: Role
    block: int | None
    rows: int
    columns: int

    @property
    def tier(self) -> Tier:
        return self.role.tier

    @property
    def source(self) -> str:
        """Name of the activation it reads; layers of one source read the same tensor."""
        return self.role.source if self.block is None or self.role.shared else f"blocks.{self.block}.{self.role.source}"

    @property
    def weights(self) -> int:
        return self.rows * self.columns


def role_of(path: str) -> tuple[Role, int | None]:
    """Role and block of a module path. Raises RecipeError for one that the table does not know."""
    for pattern, role in _COMPILED:
        if match := pattern.fullmatch(path):
            return role, int(match.group(1)) if role.pattern.startswith(_BLOCK) else None
    raise RecipeError(f"no role is known for the layer {path}; add it to the role table before it is quantized or left out")


def model_layers(config: DiTConfig) -> dict[str, Layer]:
    """Every matrix product of the transformer by name, in the order of the checkpoint's tensors; convolutions as the products they are."""
    found: dict[str, Layer] = {}
    for key, info in dit_tensors(config).items():
        name, _, kind = key.rpartition(".")
        if kind != "weight" or len(info.shape) < 2 or _NOT_PRODUCTS.fullmatch(name):
            continue
        role, block = role_of(name)
        found[name] = Layer(name, role, block, info.shape[0], math.prod(info.shape[1:]))
    return found


def quantizable(config: DiTConfig) -> dict[str, Layer]:
    """The products of tiers A and B."""
    return {name: layer for name, layer in model_layers(config).items() if layer.tier != "C"}
