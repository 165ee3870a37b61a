"""Ahead-of-time compilation of the Triton kernels, for any architecture and without a GPU."""
