"""Programs lowered to launches of this project's kernels: the CUDA engine's build."""
