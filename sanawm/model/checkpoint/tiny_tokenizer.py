"""Byte-level tokenizer of synthetic checkpoints, with Gemma's special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sanawm.errors import CheckpointError
from sanawm.model.checkpoint.lazy import require

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0, 1, 2, 3 as in Gemma
LARGEST = 512
# Prompts of synthetic checkpoints begin with this, as the official ones begin with an instruction.
CHI_PROMPT = ("Describe in detail the place that the camera moves through.", "Keep what the text already says.", "Text: ")

# Merges are learned from these, so prompts about places need about one token for two letters.
_SENTENCES = (
    "The camera moves forward along a narrow path between tall trees, and the light of the morning falls through the leaves.",
    "A wide street in an old town, with stone houses on both sides, a small shop at the corner and a church tower in the distance.",
    "Standing on the shore of a calm lake, the water reflects the mountains and the white clouds above them.",
    "The view turns to the left and shows a wooden bridge over a river; behind it there is a green field with yellow flowers.",
    "An empty hall with large windows, dust in the air, and long shadows on the floor.",
    "The scene is set in a desert at sunset, where the wind draws lines in the red sand around ancient ruins.",
    "A first-person view of a city at night: wet ground, bright signs, people with umbrellas and cars that stand in the rain.",
    "Snow covers the roofs of the village, smoke rises from the chimneys and the sky is dark blue.",
    "The corridor of a space station, metal walls with soft lights, leads to a round door that slowly opens.",
    "Walking through a garden with a fountain in the middle, one sees statues, hedges and a house with a blue door.",
    "The photograph shows a realistic and highly detailed interior with natural colors, textures and a steady perspective.",
    "Rocks, moss and ferns surround the waterfall, and the sound of the stream fills the deep valley.",
    "The environment features a fantasy castle on a cliff above the sea, its surface worn by storms.",
    "Throughout the video the camera keeps its height while the background, the buildings and the trees pass by.",
)


def build_tokenizer(vocab: int) -> Any:
    """A `tokenizers.Tokenizer` of at most `vocab` ids: four special tokens, the 256 bytes and learned merges; <bos> goes first."""
    if vocab < len(SPECIAL) + 256:
        raise CheckpointError(f"a text vocabulary of {vocab} is too small; a byte-level tokenizer needs at least {len(SPECIAL) + 256}")
    tokenizers = require("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=min(vocab, LARGEST), special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
    build_tokenizer(vocab).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
