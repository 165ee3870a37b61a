"""Grid rules and kernel variants: what is accepted, what is computed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanawm_kernels.aot import grid
from sanawm_kernels.aot.spec import PRESETS, TARGETS, KernelVariant, ModelSizes, all_variants


@given(st.integers(1, 10**6), st.integers(1, 512))
def test_cdiv_counts_tiles(size: int, tile: int) -> None:
    tiles = grid.evaluate("cdiv(M, BLOCK)", {"M": size, "BLOCK": tile})
    assert (tiles - 1) * tile < size <= tiles * tile


def test_rules_combine() -> None:
    sizes = {"M": 2640, "N": 2240, "BLOCK_M": 128, "BLOCK_N": 256}
    assert grid.evaluate("cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)", sizes) == 21 * 9
    assert grid.evaluate("min(M // 2, N) - max(3, M % 7) + 1", sizes) == 1320 - 3 + 1
    assert grid.names("cdiv(M, BLOCK_M) * max(N, 2)") == {"M", "BLOCK_M", "N"}


@pytest.mark.parametrize("rule", ["__import__('os')", "M.bit_length()", "M ** 9", "[M]", "M if M else 1", "1.5", "cdiv(M, b=2)", "M +", "True"])
def test_anything_else_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="grid rule"):
        grid.evaluate(rule, {"M": 4})


def test_missing_size_is_named() -> None:
    with pytest.raises(ValueError, match="needs the size K, given are M, N"):
        grid.evaluate("M * K", {"M": 1, "N": 2})


def variant(**changes: Any) -> KernelVariant:
    fields: dict[str, Any] = {
        "name": "test.copy", "kernel": "nowhere:copy", "signature": {"x": "*bf16:16", "n": "i32"}, "constexprs": {"BLOCK": 64, "FLAG": None},
        "grid": ("cdiv(n, BLOCK)", "1", "heads"), "grid_sizes": ("heads",),
    }  # fmt: skip
    return KernelVariant(**(fields | changes))


def test_launch_grid_knows_the_constants() -> None:
    assert variant().launch_grid({"n": 130, "heads": 20}) == (3, 1, 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Copy"}, "dotted lower-case"),
        ({"kernel": "nowhere.copy"}, "module:function"),
        ({"signature": {"x": "*int"}}, "unknown type"),
        ({"constexprs": {"n": 3, "BLOCK": 1}}, "both as arguments and as constants"),
        ({"grid": ("cdiv(m, BLOCK)", "1", "1")}, "names m"),
        ({"grid": ("x", "1", "1")}, "names x"),
    ],
)
def test_mistakes_in_a_variant_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        variant(**changes)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_variants_with_unique_names(preset: str, target: int) -> None:
    found = all_variants(PRESETS[preset], target)
    names = [each.name for each in found]
    assert names == sorted(set(names)) and len(names) > 10
    assert all(target in each.targets for each in found)


def test_sizes_follow_the_model() -> None:
    sizes = ModelSizes()
    assert (sizes.heads, sizes.tokens_per_frame, sizes.glu_width) == (20, 880, 6720)
