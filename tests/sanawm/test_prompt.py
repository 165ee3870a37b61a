"""Prompt tokenisation against transformers' tokenizer, and the token budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sanawm.errors import InputError
from sanawm.model.checkpoint.tiny_tokenizer import CHI_PROMPT, build_tokenizer
from sanawm.prompt import PromptTokenizer, select

CHI = "\n".join(CHI_PROMPT)
TOKENS = 48
BUILT = build_tokenizer(512).to_str()


def prompts(chi: str = CHI, tokens: int = TOKENS) -> PromptTokenizer:
    return PromptTokenizer(Tokenizer.from_str(BUILT), chi, tokens)


def reference() -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(BUILT), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="right"
    )


def both(text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    out = reference()([text], max_length=length, padding="max_length", truncation=True, return_tensors="np")
    return out["input_ids"], out["attention_mask"]


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=20))
def test_equals_transformers(prompt: str) -> None:
    mine = prompts(tokens=96)
    assert mine.max_length == len(reference().encode(CHI)) + 96 - 2
    for (ids, mask), text, length in (
        (mine.encode(prompt), CHI + prompt, mine.max_length),
        (mine.encode_negative(prompt), prompt, 96),
    ):
        want_ids, want_mask = both(text, length)
        assert ids.dtype == mask.dtype == np.int64
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_array_equal(mask, want_mask)


def test_without_an_instruction() -> None:
    mine = prompts(chi="")
    assert mine.max_length == TOKENS
    np.testing.assert_array_equal(mine.encode("a red door")[0], both("a red door", TOKENS)[0])
    np.testing.assert_array_equal(mine.select(), np.arange(TOKENS))


def test_special_tokens() -> None:
    ids, mask = prompts().encode("a red door")
    assert ids[0, 0] == 2 and (ids[0, mask[0] == 0] == 0).all()
    assert (np.diff(mask[0]) <= 0).all(), "padding must be on the right"


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(0, 50))
def test_selection_is_the_first_and_the_last(tokens: int, more: int) -> None:
    length = tokens + more
    chosen = select(length, tokens)
    assert chosen.shape == (tokens,)
    assert chosen.tolist() == [0, *range(length - (tokens - 1), length)]


def test_selection_equals_the_reference_index() -> None:
    mine = prompts()
    want = np.arange(mine.max_length)[[0, *range(-TOKENS + 1, 0)]]
    np.testing.assert_array_equal(mine.select(), want)
    # What survives of the instruction: <bos> and its last token.
    assert mine.select()[1] == len(reference().encode(CHI)) - 1


def test_longest_prompt_fits_and_one_more_does_not() -> None:
    mine = prompts()
    budget = TOKENS - 2
    ids, mask = mine.encode("\n" * budget)
    assert mask.all() and ids.shape == (1, mine.max_length)
    with pytest.raises(InputError, match=rf"{budget + 1} tokens long and at most {budget} fit"):
        mine.encode("\n" * (budget + 1))
    with pytest.raises(InputError, match=rf"{TOKENS} tokens long and at most {TOKENS - 1} fit"):
        mine.encode_negative("\n" * TOKENS)


def test_own_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(BUILT)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    mine = PromptTokenizer.from_file(tmp_path / "tokenizer.json", CHI, TOKENS)
    np.testing.assert_array_equal(mine.encode("a red door")[0], prompts().encode("a red door")[0])


def test_bos_is_added_where_the_file_does_not() -> None:
    tokenizer = Tokenizer.from_str(BUILT)
    tokenizer.post_processor = None
    plain = PromptTokenizer(tokenizer, CHI, TOKENS)
    np.testing.assert_array_equal(plain.encode("a red door")[0], prompts().encode("a red door")[0])
    assert plain.max_length == prompts().max_length


def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a tokenizer\.json"):
        PromptTokenizer.from_file(tmp_path / "tokenizer.json", CHI, TOKENS)
    with pytest.raises(InputError, match="character 3"):
        prompts().encode("a \udc80 door")
    other = Tokenizer.from_str(BUILT.replace("<pad>", "<filler>"))
    with pytest.raises(InputError, match="no <pad> token"):
        PromptTokenizer(other, CHI, TOKENS)
