"""bfloat16 in numpy against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sanawm.bfloat16 import from_bits, round_to, to_bits

BITS = hnp.arrays(np.uint32, st.integers(1, 30), elements=st.integers(0, 2**32 - 1))


@given(BITS)
def test_every_float32_rounds_as_in_torch(bits: np.ndarray) -> None:
    values = bits.view(np.float32)
    found = to_bits(values)
    theirs = torch.from_numpy(values.copy()).bfloat16()
    expected = theirs.view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(values)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found[number], expected[number])
    assert np.isnan(from_bits(found)[~number]).all()
    np.testing.assert_array_equal(from_bits(found), theirs.float().numpy())


@given(hnp.arrays(np.uint16, st.integers(1, 30), elements=st.integers(0, 2**16 - 1)))
def test_bits_come_back(bits: np.ndarray) -> None:
    values = from_bits(bits)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy())
    number = ~np.isnan(values)
    np.testing.assert_array_equal(to_bits(values)[number], bits[number])


def test_special_values() -> None:
    values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    # Half way goes to the even neighbour; beyond the largest finite number to infinity.
    expected = np.array([0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x7F80, 0x3F80, 0x3F82], np.uint16)
    np.testing.assert_array_equal(to_bits(values), expected)


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)])
def test_shapes(shape: tuple[int, ...]) -> None:
    values = np.ones(shape, np.float32) * np.float32(1.001)
    assert to_bits(values).shape == from_bits(to_bits(values)).shape == shape


def test_rows_of_a_transposed_array() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T
    np.testing.assert_array_equal(from_bits(to_bits(values)), values)


def test_round_to() -> None:
    values = np.array([1.001, -3.3], np.float32)
    assert round_to(values, "float32") is values
    np.testing.assert_array_equal(round_to(values, "bfloat16"), torch.from_numpy(values).bfloat16().float().numpy())
