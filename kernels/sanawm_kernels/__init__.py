"""Fused operations of the streaming DiT: plain definitions, Triton kernels, and their dispatch."""
