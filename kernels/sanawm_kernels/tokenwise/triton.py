"""Triton implementations of the token-wise operations, with the signatures of `naive`."""

from sanawm_kernels.tokenwise.block_ops import (
    depthwise_glu,
    fp8_values_transposed,
    inverse_ucpe,
    rope_heads,
    rope_heads_fp8,
    ucpe_heads,
)
from sanawm_kernels.tokenwise.row_ops import modulate, output_gate, quantize_activations, residual, residual_modulate, rms_norm

__all__ = [
    "depthwise_glu",
    "fp8_values_transposed",
    "inverse_ucpe",
    "modulate",
    "output_gate",
    "quantize_activations",
    "residual",
    "residual_modulate",
    "rms_norm",
    "rope_heads",
    "rope_heads_fp8",
    "ucpe_heads",
]
