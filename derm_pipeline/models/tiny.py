"""Complete text encoders of tiny size with random weights, as the real classes write them: for tests and dry runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_START, _END = "<|startoftext|>", "<|endoftext|>"
_MAX_TOKENS = 77
_TEXT = """a dermoscopic image of melanoma on the back of a 60 year old male
a clinical image of a melanocytic nevus, basal cell carcinoma, dermatofibroma or vascular lesion
benign keratosis and actinic keratosis on dark skin, medium skin, light skin, fitzpatrick type 1 2 3 4 5 6"""
"""Its words are tokens; all others are spelt."""


def write_tiny_clip_text(folder: Path, *, width: int = 32, seed: int = 0) -> Path:
    """Write CLIP's text model and its tokenizer to a folder: under 1 MB, the same files for the same seed.

    Args:
        folder: Where to; made if it is not there, its files replaced.
        width: Features of a token's embedding, a multiple of 4.
        seed: Decides the weights.

    Returns:
        The folder, to be given as `TextEncoderConfig.model`.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = CLIPTextModel(config)
    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _clip_tokenizer() -> Any:
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [pair for word in sorted(set(re.findall(r"[a-z]+", _TEXT))) for pair in _merges(word)]
    merges = list(dict.fromkeys(merges))
    # CLIP's own vocabulary: every letter, every letter that ends a word, what is merged, the two marks.
    names = [*letters, *(f"{letter}</w>" for letter in letters), *(pair.replace(" ", "") for pair in merges)]
    vocabulary = {name: place for place, name in enumerate([*dict.fromkeys(names), _START, _END])}
    pairs: Any = [tuple(pair.split()) for pair in merges]  # typed as a list of strings, which it does not take
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=_MAX_TOKENS)


def _merges(word: str) -> list[str]:
    """What makes one token of a word: its letters joined from the left, the last one marked."""
    letters = [*word[:-1], word[-1] + "</w>"]
    return ["".join(letters[:place]) + " " + letters[place] for place in range(1, len(letters))]
