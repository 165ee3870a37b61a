"""Prompts as token ids: instruction prefix, token budget, padding, and the selection of positions that the transformer sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sanawm.errors import InputError

Ids = NDArray[np.int64]

BOS, PAD = "<bos>", "<pad>"


def select(length: int, text_tokens: int) -> Ids:
    """Positions out of `length` that the transformer sees, (text_tokens,) int64: the first one and the last text_tokens - 1."""
    if length < text_tokens:
        raise ValueError(f"a prompt of {length} positions cannot give {text_tokens}")
    return np.concatenate([[0], np.arange(length - text_tokens + 1, length)]).astype(np.int64)


def _valid(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not valid text at character {error.start + 1}; give it in UTF-8") from error
    return prompt


class PromptTokenizer:
    """Turns a prompt into what the text encoder takes.

    `chi`, the instruction that SANA was trained with, goes before the prompt. The padded length is that of the instruction plus
    text_tokens - 2, so the selection keeps of the instruction its first token (<bos>) and its last. Padding is on the right.
    Source: SANA-WM, arXiv 2605.15178.
    """

    def __init__(self, tokenizer: Any, chi: str, text_tokens: int) -> None:
        """`tokenizer` is a `tokenizers.Tokenizer` with <bos> and <pad>; its own truncation and padding are switched off."""
        self.tokenizer = tokenizer
        self.chi = chi
        self.text_tokens = text_tokens
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._bos, self._pad = self._special(BOS), self._special(PAD)
        # Gemma's own tokenizer.json adds <bos>; a file saved without its post-processor does not.
        self._lead = [] if tokenizer.encode("").ids[:1] == [self._bos] else [self._bos]
        self._instruction = len(self._encode(chi))
        self.max_length = self._instruction + text_tokens - 2 if chi else text_tokens

    @classmethod
    def from_file(cls, path: str | Path, chi: str, text_tokens: int) -> PromptTokenizer:
        """From a tokenizer.json; InputError if the file is not one."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise InputError(f"{path} is not a tokenizer.json ({error}); use the text encoder's own") from error
        return cls(tokenizer, chi, text_tokens)

    def encode(self, prompt: str) -> tuple[Ids, Ids]:
        """Token ids and attention mask, (1, max_length) int64 each, of instruction and prompt; InputError if the prompt is too long."""
        return self._padded(self.chi + _valid(prompt), self.max_length, self._instruction if self.chi else 1)

    def encode_negative(self, prompt: str = "") -> tuple[Ids, Ids]:
        """Token ids and attention mask, (1, text_tokens) int64 each, of a negative prompt, which goes without the instruction."""
        return self._padded(_valid(prompt), self.text_tokens, 1)

    def select(self, length: int | None = None) -> Ids:
        """Positions that the transformer sees, (text_tokens,) int64; `length` is max_length unless given."""
        return select(self.max_length if length is None else length, self.text_tokens)

    def _special(self, token: str) -> int:
        number = self.tokenizer.token_to_id(token)
        if number is None:
            raise InputError(f"the tokenizer has no {token} token; use the tokenizer.json of Gemma 2 or of the checkpoint")
        return number

    def _encode(self, text: str) -> list[int]:
        return self._lead + self.tokenizer.encode(text).ids

    def _padded(self, text: str, length: int, taken: int) -> tuple[Ids, Ids]:
        ids = self._encode(text)
        if len(ids) > length:
            raise InputError(
                f"the prompt is {len(ids) - taken} tokens long and at most {length - taken} fit; shorten it to about "
                f"{(length - taken) / (len(ids) - taken):.0%} of its length"
            )
        padding = length - len(ids)
        return np.array([ids + [self._pad] * padding], np.int64), np.array([[1] * len(ids) + [0] * padding], np.int64)
