"""Random inputs of a block's gated delta network, for tests, benchmarks and tuning.

Projections are slices of one merged projection, as in the model, with channels far above the rest; values are never zero on average, so that
times measured on them are honest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from sanawm_kernels.gdn import naive
from sanawm_kernels.gdn.arguments import CameraBranch, GDNState, MainBranch
from sanawm_kernels.gdn.naive import Gates

T_ = TypeVar("T_")


@dataclass(frozen=True)
class Sample:
    """Inputs of one call."""

    main: MainBranch
    camera: CameraBranch
    gates: Gates
    chunks: tuple[int, ...]
    key_scale: float

    @property
    def options(self) -> dict[str, Any]:
        """The keywords that every implementation takes."""
        return {"chunks": self.chunks, "key_scale": self.key_scale}


def sample(
    batch: int, heads: int, head_dim: int, frames: int, tokens: int, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0, clamp: bool = False
) -> Sample:
    """Inputs of `frames` frames of `tokens` tokens; projections and weights in `dtype`, tables and ray matrices float32."""
    generator = torch.Generator().manual_seed(seed)
    C, N, H, D = heads * head_dim, frames * tokens, heads, head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def weight(x: Tensor) -> Tensor:
        return x.to(device, dtype)

    def table(angle: Tensor) -> tuple[Tensor, Tensor]:
        return angle.cos().to(device), angle.sin().to(device)

    angle = 6.3 * torch.rand(N, D // 2, generator=generator)
    # q, k, v of both branches, the output gate, the write strengths, the decays, and padding to a multiple of 64 columns.
    width = -(-(7 * C + 2 * H) // 64) * 64
    projection = normal(batch, N, width)
    projection[..., ::41] *= 8
    projection = projection.to(device, dtype)
    parts = [projection[..., i * C : (i + 1) * C] for i in range(6)]
    conv = [weight(0.3 * normal(C, 4) + torch.tensor([0.0, 0.0, 0.0, 1.0])) for _ in range(2)]
    norms = [weight(1 + 0.2 * normal(C)) for _ in range(4)]
    rays, inverse = (x.to(device).contiguous() for x in _ray_matrices(batch, N, generator))
    beta, decay = projection[..., 7 * C : 7 * C + H], projection[..., 7 * C + H : 7 * C + 2 * H]
    # The tokens of a frame agree on more than noise.
    decay += normal(batch, frames, 1, H).expand(-1, -1, tokens, -1).reshape(batch, N, H).to(decay)
    gates = Gates(beta, decay, weight(0.3 * normal(H)), weight(0.5 * normal(H) - 2))
    (cos, sin), (camera_cos, camera_sin) = table(angle), table(angle[:, _camera_pairs(D)])
    main = MainBranch(parts[0], parts[1], parts[2], conv[0], norms[0], norms[1], cos, sin)
    camera = CameraBranch(parts[3], parts[4], parts[5], conv[1], norms[2], norms[3], rays, inverse, camera_cos, camera_sin, clamp)
    return Sample(main, camera, gates, (frames,), (D * tokens) ** -0.5)


def _camera_pairs(head_dim: int) -> list[int]:
    """Columns of the main rotary table that make the camera branch's: the first frequencies of time, rows and columns."""
    side, camera_side = head_dim // 6, head_dim // 12
    time, camera_time = head_dim // 2 - 2 * side, head_dim // 4 - 2 * camera_side
    return [*range(camera_time), *range(time, time + camera_side), *range(time + side, time + side + camera_side)]


def _ray_matrices(batch: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rigid transforms (batch, tokens, 4, 4) and their inverses, translations of the size of a minute's path."""
    basis, _ = torch.linalg.qr(torch.randn(batch, tokens, 3, 3, generator=generator, dtype=torch.float64))
    offset = 2 * torch.randn(batch, tokens, 3, 1, generator=generator, dtype=torch.float64)
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64).expand(batch, tokens, 1, 4)
    forward = torch.cat((torch.cat((basis, offset), -1), bottom), -2)
    back = basis.transpose(-1, -2)
    return forward.float(), torch.cat((torch.cat((back, -back @ offset), -1), bottom), -2).float()


def double(x: T_) -> T_:
    """A copy of a group of tensors in float64."""
    values = {f.name: getattr(x, f.name) for f in fields(x)}  # type: ignore[arg-type]
    return type(x)(**{name: v.double() if isinstance(v, Tensor) else v for name, v in values.items()})


def reference(inputs: Sample, state: GDNState | None = None) -> tuple[Tensor, Tensor, GDNState]:
    """Main output, camera output and new state by the plain definition in float64."""
    m, c, gates = double(inputs.main), double(inputs.camera), double(inputs.gates)
    old = None if state is None else double(state)
    main_state: Any = None if old is None else (old.s, old.z, old.k_tail)
    camera_state: Any = None if old is None else (old.s_cam, old.cam_tail)
    main, s, z, k_tail = naive.main_gdn(
        m.q, m.k, m.v, gates, m.conv, m.q_norm, m.k_norm, m.cos, m.sin,
        state=main_state, **inputs.options,
    )  # fmt: skip
    camera, s_cam, cam_tail = naive.camera_gdn(
        c.q, c.k, c.v, gates, c.conv, c.q_norm, c.k_norm, c.rays, c.rays_inverse, c.cos, c.sin, clamp=c.clamp, carry=c.carry,
        state=camera_state, **inputs.options,
    )  # fmt: skip
    return main, camera, GDNState(s, z, k_tail, s_cam, cam_tail)


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Relative L2 distance; infinite where x is not finite."""
    error = float((x.double() - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf
