"""Gemma-2 text encoder: token ids to the embedding that the transformer attends to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sanawm.config import TextConfig
from sanawm.model.checkpoint.checkpoint import check_text
from sanawm.model.checkpoint.lazy import require
from sanawm.model.checkpoint.metadata import read_text_config, text_config_json

# Shapes: L tokens of the padded prompt, K text tokens that the transformer sees, C hidden width.


class TextEncoder(nn.Module):
    """transformers' Gemma2Model, the last hidden state of which is taken after the final norm at the first and the last K - 1 positions.

    The masks are built here, as plain additive ones, so the module exports to a graph of standard operators with static shapes.
    Source: SANA-WM, arXiv 2605.15178; the selection is that of SANA's instruction prefix.
    """

    def __init__(self, model: Any, text_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.text_tokens = text_tokens

    @classmethod
    def from_config(cls, config: TextConfig, text_tokens: int) -> TextEncoder:
        """An encoder with transformers' random initialisation, float32."""
        transformers = require("transformers")
        fields = {name: value for name, value in text_config_json(config).items() if name not in ("architectures", "model_type")}
        return cls(transformers.Gemma2Model(_eager(transformers.Gemma2Config(**fields))), text_tokens).eval()

    @classmethod
    def from_folder(cls, folder: Path, text_tokens: int, dtype: torch.dtype = torch.bfloat16) -> TextEncoder:
        """Load a Hugging Face Gemma-2 folder (safetensors only) in `dtype`.

        Raises CheckpointError for another model and for missing, unexpected or misshaped tensors.
        """
        check_text(folder, read_text_config(folder))
        transformers = require("transformers")
        config = _eager(transformers.Gemma2Config.from_pretrained(folder, local_files_only=True))
        with _no_progress_bar(transformers):
            options = {"config": config, "dtype": dtype, "use_safetensors": True, "local_files_only": True}
            model = transformers.Gemma2Model.from_pretrained(folder, **options)
        return cls(model, text_tokens).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids, attention_mask (1, L) int64 -> embedding (1, K, C) in the model's dtype, mask (1, K) bool, true on real tokens."""
        config = self.model.config
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device)
        real = attention_mask.bool()
        visible = (positions[None, :] <= positions[:, None]) & real[:, None, None, :]
        recent = positions[:, None] - positions[None, :] < config.sliding_window
        hidden = self.model(
            input_ids=input_ids,
            attention_mask={"full_attention": self._additive(visible), "sliding_attention": self._additive(visible & recent)},
            position_ids=positions[None],
            use_cache=False,
        ).last_hidden_state
        return self._select(hidden), self._select(real)

    def _additive(self, visible: Tensor) -> Tensor:
        dtype = self.model.dtype
        zero = torch.zeros((), dtype=dtype, device=visible.device)
        return torch.where(visible, zero, torch.finfo(dtype).min)

    def _select(self, x: Tensor) -> Tensor:
        return torch.cat((x[:, :1], x[:, x.shape[1] - self.text_tokens + 1 :]), 1)


@contextmanager
def _no_progress_bar(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _eager(config: Any) -> Any:
    # Gemma-2 caps its attention logits, which only the plain implementation does.
    config._attn_implementation = "eager"
    return config
