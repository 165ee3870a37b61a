"""Softmax attention over cached and current tokens, and cross-attention to the caption."""
