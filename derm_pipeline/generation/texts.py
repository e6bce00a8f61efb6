"""What a generator that is told text is told of each sample: a caption as those that it learnt, or a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from derm_pipeline.captions.metadata import CaptionStyle, MetadataCaptionConfig, metadata_caption
from derm_pipeline.generation.drawing import EmbedText
from derm_pipeline.generation.plan import SampleRequest
from derm_pipeline.latents import Embeddings
from derm_pipeline.models.conditions import TEXT, TEXT_MASK
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


def text_of_requests(
    requests: Sequence[SampleRequest],
    embeddings: Embeddings,
    embed: Callable[[Sequence[str]], Mapping[str, Tensor]],
) -> EmbedText:
    """A function that gives the embeddings of these requests' texts; a request without text is told none.

    Args:
        requests: All that it will be asked for.
        embeddings: What the generator learnt from, looked into first.
        embed: Called once at most, with the texts that are not there.
    """
    wanted = dict.fromkeys(request.text for request in requests if request.text is not None)
    new = [text for text in wanted if text not in embeddings]
    fresh = (
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in embed(new).items()}
        if new
        else {}
    )
    place = {text: row for row, text in enumerate(new)}
    shapes = {name: embeddings.shapes[name] for name in (TEXT, TEXT_MASK)}

    def embed_text(batch: Sequence[SampleRequest]) -> tuple[Tensor, Tensor]:
        text = torch.zeros(len(batch), *shapes[TEXT], dtype=torch.float16)
        mask = torch.zeros(len(batch), *shapes[TEXT_MASK], dtype=torch.bool)
        for row, request in enumerate(batch):
            if request.text is None:
                continue
            if request.text in place:
                found = {name: tensor[place[request.text]] for name, tensor in fresh.items()}
            else:
                found = {
                    name: tensor[0] for name, tensor in embeddings.gather(embeddings.rows_of([request.text])).items()
                }
            text[row], mask[row] = found[TEXT], found[TEXT_MASK]
        return text, mask

    return embed_text
