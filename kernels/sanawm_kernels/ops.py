"""Dispatch of the fused operations to one implementation, chosen explicitly and never changed silently."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from sanawm_kernels import rotary
from sanawm_kernels.gdn import naive as gdn_naive

NAIVE = SimpleNamespace(main_gdn=gdn_naive.main_gdn, camera_gdn=gdn_naive.camera_gdn, ucpe=rotary.ucpe)

_implementation: ContextVar[Any] = ContextVar("sanawm_kernels.implementation", default=NAIVE)


@contextmanager
def implementation(chosen: Any) -> Iterator[None]:
    """Run the enclosed calls with `chosen`, any object that has `main_gdn`, `camera_gdn` and `ucpe` with the plain definitions' signatures."""
    token = _implementation.set(chosen)
    try:
        yield
    finally:
        _implementation.reset(token)


def main_gdn(*args: Any, **kwargs: Any) -> Any:
    """See `sanawm_kernels.gdn.naive.main_gdn`."""
    return _implementation.get().main_gdn(*args, **kwargs)


def camera_gdn(*args: Any, **kwargs: Any) -> Any:
    """See `sanawm_kernels.gdn.naive.camera_gdn`."""
    return _implementation.get().camera_gdn(*args, **kwargs)


def ucpe(*args: Any, **kwargs: Any) -> Any:
    """See `sanawm_kernels.rotary.ucpe`."""
    return _implementation.get().ucpe(*args, **kwargs)
