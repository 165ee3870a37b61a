"""Where kernel tests run: in Triton's interpreter, or with `-m gpu` on a GPU.

Triton decides at a kernel's definition whether to interpret it, so the choice is made before any test module is imported. Tests of the compiler run
it in a process of their own, without the interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs compiled kernels on a CUDA device; select with -m gpu")
    if config.option.markexpr == "gpu" and torch.cuda.is_available():
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if item not in on_gpu]
