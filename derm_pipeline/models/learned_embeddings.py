"""Learned embeddings: new tokens of a text encoder, as files, and into a tokenizer and its encoder's rows.

A file is {token: (vectors, width)}; of one token it is what diffusers' `load_textual_inversion` reads. A token of
several vectors is spelled token, token_1, token_2 ..., as diffusers does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from derm_pipeline.models.lora import some
from derm_pipeline.store import replacing

if TYPE_CHECKING:
    from torch import Tensor

FILE = "learned_embeds.safetensors"

_MAX_TOKENS, _MAX_VECTORS, _MAX_LENGTH = 10_000, 128, 100
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]+")


def save_embeddings(path: Path, embeddings: Mapping[str, Tensor]) -> None:
    """Write tokens and their vectors (vectors, width) to one file.

    Raises:
        ValueError: no token, one with spaces, or vectors that are none.
    """
    from safetensors.torch import save_file

    _check(embeddings, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        tensors = {token: vectors.detach().cpu().contiguous() for token, vectors in embeddings.items()}
        save_file(tensors, aside, metadata={"format": "pt"})


def save_each_embedding(folder: Path, embeddings: Mapping[str, Tensor]) -> dict[str, Path]:
    """Write a file for every token, called by it as far as it can be a file's name; returns them by token."""
    paths: dict[str, Path] = {}
    for token, vectors in embeddings.items():
        word = _NOT_IN_NAMES.sub("-", token).strip("-") or "token"
        name, number = word, 1
        while folder / f"{name}.safetensors" in paths.values():
            number += 1
            name = f"{word}-{number}"
        paths[token] = folder / f"{name}.safetensors"
        save_embeddings(paths[token], {token: vectors})
    return paths


def load_embeddings(path: Path) -> dict[str, Tensor]:
    """The tokens of a file and their vectors (vectors, width).

    Args:
        path: The file, or a folder with `learned_embeds.safetensors`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else, and what.
    """
    from safetensors import SafetensorError, safe_open

    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} is no .safetensors file; other weights can run code when they are read")
    try:
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
            if len(names) > _MAX_TOKENS:
                raise ValueError(f"{file} holds {len(names):,} tensors; at most {_MAX_TOKENS:,} tokens are read")
            sizes = {name: handle.get_slice(name).get_shape() for name in names}
            _check_sizes(sizes, str(file))
            found = {name: handle.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or a broken one: {error}") from None
    embeddings = {token: vectors if vectors.ndim == 2 else vectors[None] for token, vectors in found.items()}
    _check(embeddings, str(file))
    return embeddings


def spellings(token: str, num_vectors: int) -> tuple[str, ...]:
    """The tokens that stand for one of several vectors; a text must spell them all, one after another."""
    return (token, *(f"{token}_{index}" for index in range(1, num_vectors)))


def add_embeddings(
    tokenizer: Any, text_encoder: Any, embeddings: Mapping[str, Tensor], *, where: str = "the embeddings"
) -> dict[str, tuple[int, ...]]:
    """Teach a tokenizer new tokens and its text encoder their vectors; all other rows stay as they are, to the bit.

    Args:
        tokenizer: Of transformers.
        text_encoder: Its network; it gets rows where it has none to spare.
        embeddings: The vectors (vectors, width) by token.
        where: Begins a message.

    Returns:
        The ids of every token's vectors, which are the rows of the encoder's table.

    Raises:
        ValueError: a token that exists already, or vectors of another width; nothing is changed then.
    """
    import torch

    _check(embeddings, where)
    table = text_encoder.get_input_embeddings().weight
    wide = [token for token, vectors in embeddings.items() if vectors.shape[1] != table.shape[1]]
    if wide:
        width = embeddings[wide[0]].shape[1]
        raise ValueError(f"{where}: {some(wide)} has {width} features, and the text encoder's tokens {table.shape[1]}")
    spelled = {token: spellings(token, len(vectors)) for token, vectors in embeddings.items()}
    every = [word for words in spelled.values() for word in words]
    vocabulary = tokenizer.get_vocab()
    taken = [word for word in every if word in vocabulary] or [word for word in every if every.count(word) > 1]
    if taken:
        raise ValueError(f"{where}: the tokenizer has {some(dict.fromkeys(taken))} already; choose other tokens")
    tokenizer.add_tokens(every)
    ids = {token: tuple(tokenizer.convert_tokens_to_ids(list(words))) for token, words in spelled.items()}
    _grow(text_encoder, 1 + max(max(own) for own in ids.values()))
    table = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        for token, own in ids.items():
            table[list(own)] = embeddings[token].to(table)
    return ids


def take_embeddings(text_encoder: Any, ids: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Copies of the vectors that `add_embeddings` gave these ids to, float32 on the CPU."""
    table = text_encoder.get_input_embeddings().weight.detach()
    return {token: table[list(own)].float().cpu() for token, own in ids.items()}


def _grow(text_encoder: Any, num_rows: int) -> None:
    """Give the table as many rows, if it has fewer, without a draw from the global generator."""
    import torch

    table = text_encoder.get_input_embeddings().weight
    if num_rows <= table.shape[0]:
        return
    with torch.random.fork_rng(devices=[table.device] if table.device.type == "cuda" else []):
        text_encoder.resize_token_embeddings(num_rows, mean_resizing=False)
    text_encoder.get_input_embeddings().weight.requires_grad_(table.requires_grad)


def _check_sizes(sizes: Mapping[str, list[int]], where: str, *, num_axes: tuple[int, ...] = (1, 2)) -> None:
    if not sizes:
        raise ValueError(f"{where} holds no token")
    for token, shape in sizes.items():
        is_word = 0 < len(token) <= _MAX_LENGTH and token.isprintable() and not re.search(r"\s", token)
        if not is_word:
            raise ValueError(f"{where}: {token[:_MAX_LENGTH]!r} is no token: no spaces, at most {_MAX_LENGTH} letters")
        if len(shape) not in num_axes or 0 in shape or (len(shape) == 2 and shape[0] > _MAX_VECTORS):
            raise ValueError(
                f"{where}: {token} is {tuple(shape)}; a token has 1 to {_MAX_VECTORS} vectors (vectors, width)"
            )


def _check(embeddings: Mapping[str, Tensor], where: str) -> None:
    _check_sizes({token: list(vectors.shape) for token, vectors in embeddings.items()}, where, num_axes=(2,))
    broken = [
        token
        for token, vectors in embeddings.items()
        if not vectors.is_floating_point() or not vectors.isfinite().all()
    ]
    if broken:
        raise ValueError(f"{where}: {some(broken)} holds values that are no finite numbers")
