"""sglang's Triton kernels for SANA-WM's gated delta network, with the torch code around them, as a peer to time.

The wheel's own modules are run as they are: `BidirectionalGDNUCPESinglePathLiteLA` with its Triton backend, fed raw projections in place of its
linear layers. sglang does not import without all of its engine, so the few symbols these modules take from it are stood in for. The Triton path
carries no state between chunks (sglang's streaming path does, in plain torch, and is slower): the peer does less than is compared with it.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sanawm_kernels.gdn.samples import Sample

COMPONENTS = "sglang/multimodal_gen/runtime/models/dits/sana_wm_components.py"
KERNELS = tuple(f"sglang/kernels/ops/diffusion/attention/{name}.py" for name in ("sana_wm_gdn_chunkwise_triton", "sana_wm_gdn_triton"))
RUNTIME = "sglang.multimodal_gen.runtime"
STAND_INS = ("sglang.kernels.ops.diffusion.attention", f"{RUNTIME}.layers.attention", f"{RUNTIME}.utils.logging_utils")


class _AlwaysOff:
    """Stands in for the gate that turns on fusions not used here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


def load(wheel: Path) -> ModuleType:
    """sglang's components module from a wheel, or from a directory it was unpacked to."""
    root = wheel
    if wheel.is_file():
        # Kept for the life of the process: Triton reads kernels' sources from their files.
        root = Path(tempfile.mkdtemp(prefix="sglang-peer-"))
        with zipfile.ZipFile(wheel) as archive:
            for name in (COMPONENTS, *KERNELS):
                archive.extract(name, root)
    for name in STAND_INS:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    diffusion: Any = sys.modules["sglang.kernels.ops.diffusion"]
    sys.modules["sglang.kernels.ops"].diffusion = diffusion  # type: ignore[attr-defined]
    diffusion.BitExactFusionGate, diffusion.tensors_equal = _AlwaysOff, torch.equal
    sys.modules[STAND_INS[1]].LocalAttention = torch.nn.Identity  # type: ignore[attr-defined]
    sys.modules[STAND_INS[2]].init_logger = logging.getLogger  # type: ignore[attr-defined]
    for path in KERNELS:
        module = _module(path.removesuffix(".py").replace("/", "."), root / path)
        for name in ("fused_bigdn_func", "fused_qk_inv_rms", "prepare_rope_tables", "cam_scan_bidi_chunkwise"):
            if hasattr(module, name):
                setattr(diffusion, name, getattr(module, name))
    return _module("sglang.multimodal_gen.runtime.models.dits.sana_wm_components", root / COMPONENTS)


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def block(components: Any, inputs: Sample, grid: tuple[int, int], backend: str = "triton") -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that computes both branches of `inputs` (B = 1, RMS clamp on, no carried state) from raw projections to outputs.

    grid: rows and columns of a frame. backend: "triton", or "torch", sglang's own plain path.
    """
    m, c, gates = inputs.main, inputs.camera, inputs.gates
    B, N, C = m.q.shape
    T, H = inputs.chunks[0], gates.A_log.shape[0]
    D, size = C // H, (T, *grid)
    layer = components.BidirectionalGDNUCPESinglePathLiteLA(C, H, D, gdn_backend=backend).to(m.q.device, m.q.dtype).eval()
    with torch.no_grad():
        for mine, theirs in ((m.conv, layer.conv_k), (c.conv, layer.conv_k_cam)):
            theirs.weight.copy_(mine.unsqueeze(1))
        for mine, theirs in ((m.q_norm, layer.q_norm), (m.k_norm, layer.k_norm), (c.q_norm, layer.q_norm_cam), (c.k_norm, layer.k_norm_cam)):
            theirs.weight.copy_(mine)
    # Their merged projection is contiguous, as their linear layer leaves it.
    projected = torch.cat((m.q, m.k, m.v), -1).contiguous()
    del layer.qkv
    layer.qkv = lambda x: projected
    layer._cam_qkv = lambda x: (c.q, c.k, c.v)
    beta = gates.beta().to(m.q.dtype).reshape(B, T, N // T, H).permute(0, 3, 1, 2)
    decay = gates.decay(T).transpose(1, 2)
    rotary = torch.complex(m.cos.double(), m.sin.double())[None, None]
    transforms = components._build_ucpe_apply_fns(D, c.rays.expand(B, -1, -1, -1).to(m.q.dtype), rotary)

    def call() -> tuple[Tensor, Tensor]:
        components._compute_frame_gates = lambda *_: (beta, decay)
        with torch.inference_mode():
            main, _, _ = layer._main_branch_gdn(m.q, size, rotary)
            return main, layer._cam_branch(m.q, size, *transforms, beta, decay)

    return call
