"""What Gluon kernels with roles for warps need of Triton 3.6 to 3.9, under one name: transfers through descriptors and the roles' barrier."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# (descriptor, coordinates, barrier, shared memory) and (descriptor, coordinates, shared memory). In Triton 3.9 the older names raise.
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
# Waits for the threads of one role; renamed in Triton 3.7.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
