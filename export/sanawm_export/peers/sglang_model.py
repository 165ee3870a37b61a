"""sglang's streaming SANA-WM transformer as a peer to time: its modules as they are, without its serving runtime.

`load` takes a folder that holds the package `sglang` as its wheel has it. sglang does not import without all of its engine; what its model code takes
from it is stood in for: attention is torch's scaled_dot_product_attention, mixins and logging do nothing. Model, kernels, the fusion gates, the chunk
grid and the cache window are sglang's own. `Peer` runs the chunk loop of its self-forcing stage: four Euler steps and the clean pass of each chunk.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RUNTIME, CONFIGS = "sglang.multimodal_gen.runtime", "sglang.multimodal_gen.configs"
STAGE = f"{RUNTIME}.pipelines_core.stages.model_specific_stages.sana_wm"
# Packages whose __init__ would import the engine; their modules are found without it.
PACKAGES = (
    "sglang", "sglang.kernels", "sglang.multimodal_gen", CONFIGS, f"{CONFIGS}.models", f"{CONFIGS}.models.dits", RUNTIME, f"{RUNTIME}.models",
    f"{RUNTIME}.models.dits", f"{RUNTIME}.pipelines_core", f"{RUNTIME}.pipelines_core.stages",
    f"{RUNTIME}.pipelines_core.stages.model_specific_stages", STAGE,
)  # fmt: skip
STEPS = (1000, 960, 889, 727, 0)
CHUNK = 3
# Standard deviation of parameters that training starts at zero: what is multiplied by zeros would be free.
SPREAD = 0.02


class _Attention(nn.Module):
    """Stands in for sglang's choice of a backend: (B, N, H, D) through torch's own attention."""

    def __init__(self, num_heads: int, head_size: int, causal: bool = False, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.causal, self.scale = causal, softmax_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, attn_mask: Tensor | None = None, **__: Any) -> Tensor:
        mask = attn_mask.bool()[:, None, None, :] if attn_mask is not None and attn_mask.ndim == 2 else attn_mask
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal, scale=self.scale).transpose(1, 2)


class _Logger(logging.Logger):
    def once(self, *_: Any, **__: Any) -> None:
        """Says nothing."""

    info_once = warning_once = debug_once = once


class _Transformer(nn.Module):
    """Stands in for sglang's base class."""

    def __init__(self, config: Any, hf_config: Any = None, **_: Any) -> None:
        super().__init__()
        self.config = config.arch_config


@dataclass
class _ArchConfig:
    param_names_mapping: dict[str, str] = field(default_factory=dict)
    reverse_param_names_mapping: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        return


@dataclass
class _Config:
    arch_config: _ArchConfig = field(default_factory=_ArchConfig)
    prefix: str = ""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "arch_config":
            raise AttributeError(name)
        return getattr(self.arch_config, name)


def _stand_in(name: str, **symbols: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(symbols)
    sys.modules[name] = module


@dataclass(frozen=True)
class Modules:
    """sglang's modules: the transformer's, its configuration's and the sampler's."""

    dit: Any
    config: Any
    sampler: Any


def load(root: Path) -> Modules:
    """sglang's modules from `root`/sglang. Raises ImportError for what is not there."""
    for name in PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = package
    _stand_in(f"{RUNTIME}.layers.attention", LocalAttention=_Attention)
    _stand_in(f"{RUNTIME}.managers.memory_managers.layerwise_offload", LayerwiseOffloadableModuleMixin=type("Mixin", (), {}))
    _stand_in(f"{RUNTIME}.utils.logging_utils", init_logger=_Logger)
    _stand_in(f"{RUNTIME}.models.dits.base", CachableDiT=_Transformer)
    _stand_in(f"{CONFIGS}.models.dits.base", DiTArchConfig=_ArchConfig, DiTConfig=_Config)
    _stand_in(f"{CONFIGS}.models.fsdp", is_blocks_or_transformer_blocks=lambda *_: False)
    names = (f"{RUNTIME}.models.dits.sana_wm", f"{CONFIGS}.models.dits.sana_wm", f"{STAGE}.self_forcing")
    return Modules(*(importlib.import_module(name) for name in names))


def build(modules: Modules, device: str, dtype: torch.dtype, **sizes: Any) -> Any:
    """The transformer with random weights, none of them zero; `sizes` replace fields of its configuration."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = modules.dit.SanaWMTransformer3DModel(modules.config.SanaWMConfig(arch_config=modules.config.SanaWMArchConfig(**sizes)))
    finally:
        torch.set_default_dtype(before)
    for module in model.modules():
        if hasattr(module, "_init_freqs_buffer"):
            module._init_freqs_buffer()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, SPREAD)
    return model.to(device).eval().requires_grad_(False)


class Peer:
    """A clip of random latents, text and camera, chunk after chunk."""

    def __init__(self, modules: Modules, model: Any, chunks: int, grid: tuple[int, int], device: str, dtype: torch.dtype) -> None:
        """grid: rows and columns of a latent frame. The first chunk has one frame more than the others, as in clips of 24k + 1 frames."""
        self._sampler, self.model, self._device = modules.sampler.SanaWMSelfForcingSampler, model, device
        self._slots, blocks = modules.dit._NUM_STREAM_CACHE_SLOTS, len(model.blocks)
        arch = model.config
        frames = CHUNK * chunks + 1
        self.grid: list[int] = self._sampler.create_autoregressive_segments(frames, CHUNK)
        self._sigmas = torch.tensor([step / 1000 for step in STEPS], device=device)
        random = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device).to(dtype)

        self.latents = normal(1, arch.in_channels, frames, *grid)
        self._first = self.latents[:, :, :1].clone()
        self._text = normal(1, arch.model_max_length, arch.caption_channels)
        self._mask = torch.ones(1, arch.model_max_length, dtype=torch.bool, device=device)
        self._plucker = normal(1, arch.chunk_plucker_channels, frames, *grid)
        camera = torch.zeros(1, frames, 20, device=device)
        camera[0, :, :16] = torch.eye(4, device=device).reshape(-1)
        camera[0, :, 11] = 0.1 * torch.arange(frames, device=device)
        camera[0, :, 16:] = torch.tensor([grid[1], grid[1], grid[1] / 2, grid[0] / 2], device=device)
        self._camera = camera.to(dtype)
        self._cache: list[Any] = [[[None] * self._slots for _ in range(blocks)] for _ in range(chunks)]
        self._blocks = blocks

    @torch.no_grad()
    def chunk(self, index: int) -> None:
        """Denoise a chunk and write its cache, with the cache that sglang's stage passes: sink and previous chunk, or the recurrent state."""
        cache, sink = self._sampler.accumulate_kv_cache(self._cache, index, self.grid, 2, True, self._blocks)
        start, end = self.grid[index], self.grid[index + 1]
        numbers = torch.arange(start, end, device=self._device) if sink else None
        moving = torch.ones(1, 1, end - start, device=self._device)
        if start == 0:
            moving[:, :, 0] = 0.0

        def forward(timestep: Tensor, save: bool) -> tuple[Tensor, Any]:
            return self.model.forward_long(
                self.latents[:, :, start:end], self._text, timestep, self._mask, self._camera, self._plucker, kv_cache=cache, save_kv_cache=save,
                start_f=start, end_f=end, frame_index=numbers,
            )  # fmt: skip

        for sigma, following in zip(self._sigmas[:-1], self._sigmas[1:]):
            velocity, _ = forward(1000 * sigma * moving, False)
            stepped = self.latents[:, :, start:end].float() - (sigma - following) * velocity.float()
            self.latents[:, :, start:end] = stepped.to(self.latents.dtype)
            if start == 0:
                self.latents[:, :, :1] = self._first
        _, self._cache[index] = forward(torch.zeros_like(moving), True)

    def compile(self, wrap: Callable[[Any], Any]) -> None:
        """Let every block's streaming forward be `wrap` of itself."""
        for block in self.model.blocks:
            block.forward_long = wrap(block.forward_long)
