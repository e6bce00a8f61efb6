"""What a generator that is told text is told of each sample: a caption as those that it learnt, or a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from derm_pipeline.captions.metadata import CaptionStyle, MetadataCaptionConfig, metadata_caption
from derm_pipeline.generation.plan import SampleRequest
from derm_pipeline.generation.told import EmbedText
from derm_pipeline.latents import Embeddings
from derm_pipeline.store import digest_of_json


def caption_requests(
    requests: Sequence[SampleRequest],
    captions: Sequence[str],
    known: Mapping[str, Sequence[str | int | None]],
    style: CaptionStyle,
    common: Mapping[str, str] | None = None,
) -> list[SampleRequest]:
    """The requests, each with a caption unless it has a text already.

    It is the caption of a training image of which all that the sample is told is known, drawn by the sample's seed:
    samples then are told what the generator learnt from, in all its variety, whatever wrote the captions. Where there
    is no such image (a diagnosis never seen on that skin type), one that says otherwise would contradict what is asked
    for, so the caption is written from what is told, in the recipe's style.

    Args:
        requests: The samples.
        captions: Of the training images.
        known: By condition, what is known of each training image.
        style: Of a caption that is written.
        common: What is known of every training image alike, such as its modality, by the names of `records`.
    """
    alike: dict[tuple[tuple[str, str], ...], list[int]] = {}

    def caption_of(request: SampleRequest) -> str:
        told = tuple((name, str(request.told(name))) for name in request.conditions)
        if told not in alike:
            alike[told] = [
                row for row in range(len(captions)) if all(str(known[name][row]) == value for name, value in told)
            ]
        rows = alike[told]
        if not rows:
            row = {**(common or {}), **dict(told), "skin_type": request.skin_type}
            return metadata_caption(row, config=MetadataCaptionConfig(style=style))
        return captions[rows[int(digest_of_json(["caption", request.seed])[:16], 16) % len(rows)]]

    return [request if request.text is not None else replace(request, text=caption_of(request)) for request in requests]


def text_of_requests(requests: Sequence[SampleRequest], embeddings: Embeddings, embed: EmbedText) -> EmbedText:
    """A text encoder for the texts of these requests that looks into the embeddings of the training texts first.

    Args:
        requests: All that will be drawn.
        embeddings: What the generator learnt from, looked into first.
        embed: Called once at most, with the texts that are not there; kept as the cache keeps them, in float16.
    """
    texts = [text for request in requests for text in (request.text, request.negative_prompt) if text is not None]
    new = [text for text in dict.fromkeys(texts) if text not in embeddings]
    fresh = {name: _halved(tensor) for name, tensor in embed(new).items()} if new else {}
    place = {text: row for row, text in enumerate(new)}

    def row_of(text: str) -> dict[str, Tensor]:
        if text in place:
            return {name: tensor[place[text]] for name, tensor in fresh.items()}
        return {name: tensor[0] for name, tensor in embeddings.gather(embeddings.rows_of([text])).items()}

    def embed_texts(wanted: list[str]) -> dict[str, Tensor]:
        rows = [row_of(text) for text in wanted]
        return {name: torch.stack([row[name].cpu() for row in rows]) for name in rows[0]}

    return embed_texts


def looked_up_first(embeddings: Embeddings | None, load: Callable[[], EmbedText]) -> EmbedText:
    """A text encoder that looks into the embeddings of the training texts first, and is loaded when a text is new.

    Args:
        embeddings: What the generator learnt from; None where it is told otherwise by now.
        load: Called once at most.
    """
    loaded: list[EmbedText] = []

    def embed_texts(wanted: list[str]) -> Mapping[str, Tensor]:
        if embeddings is not None and all(text in embeddings for text in wanted):
            return embeddings.gather(embeddings.rows_of(wanted))
        if not loaded:
            loaded.append(load())
        return loaded[0](wanted)

    return embed_texts


def _halved(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor
