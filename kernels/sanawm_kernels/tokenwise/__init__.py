"""Fusions that work token by token: norms, modulation, residuals, gates, the depthwise convolution, attention prologues."""
