"""Captions as a condition: their embeddings in the latents, read by training, sampling and `derm generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa

from derm_pipeline.captions.metadata import STYLES
from derm_pipeline.defs.stages.fitting import latents_of, values_of
from derm_pipeline.defs.stages.sets import TOLD, TRAINING_SET
from derm_pipeline.store import Artifact, Build, Store, StoreError

if TYPE_CHECKING:
    from torch import Tensor

    from derm_pipeline.generation import EmbedText, SampleRequest
    from derm_pipeline.latents import Embeddings
    from derm_pipeline.recipes.model import Recipe

TEXTS = "text"
"""Folder of the embeddings in the latents, there where the generator is told text."""
ENCODER = f"{TEXTS}/encoder.json"

OnProgress = Callable[[int, int], None]


def text_settings(recipe: Recipe) -> dict[str, object]:
    """What the latents depend on where the generator is told text; nothing else."""
    text = recipe.generator.text
    return {} if text is None else {"text": text.encoder.identity()}


def embed_captions(
    build: Build, recipe: Recipe, tables: Sequence[pa.Table], on_progress: OnProgress | None = None
) -> None:
    """Write the embeddings of the captions that are told of these rows into the latents; nothing where none are."""
    from derm_pipeline.latents import write_embeddings
    from derm_pipeline.models.runtime import pick_device
    from derm_pipeline.models.text_encoder import load_text_encoder

    text = recipe.generator.text
    if text is None:
        return
    encoder = load_text_encoder(text.encoder, pick_device())
    captions = list(dict.fromkeys(caption for table in tables for caption in table[TOLD].to_pylist()))
    num_reused = write_embeddings(
        build.directory / TEXTS,
        captions,
        encoder.embed,
        encoder=encoder.config.identity(),
        previous=build.previous.directory / TEXTS if build.previous else None,
        on_progress=on_progress,
    )
    build.write_json(ENCODER, encoder.config.model_dump(mode="json"))
    num_cut = sum(num > text.encoder.max_tokens for num in encoder.num_tokens(captions))
    build.counts.update(num_texts=len(captions), num_texts_cut=num_cut, num_texts_reused=num_reused)


def embeddings_of(latents: Artifact) -> Embeddings | None:
    """The embeddings in the latents; None where no text is told."""
    from derm_pipeline.latents import open_embeddings

    return open_embeddings(latents.path(TEXTS)) if ENCODER in latents.manifest.files else None


def text_rows(embeddings: Embeddings | None, rows: pa.Table) -> dict[str, Tensor]:
    """As a label "text", the row of what is told of each image; none where no text is told."""
    import torch

    from derm_pipeline.models.conditions import TEXT

    return {} if embeddings is None else {TEXT: torch.from_numpy(embeddings.rows_of(rows[TOLD].to_pylist()))}


def requests_in_words(
    store: Store, generator: Artifact, requests: Sequence[SampleRequest]
) -> tuple[list[SampleRequest], EmbedText | None]:
    """The requests with the text that each is told, and their embeddings; as they are where no text is told.

    A request without a text gets a caption of a training image like it; an empty text is told as none.

    Raises:
        StoreError: the latents from which the generator learnt, or their training set, are gone.
        FileNotFoundError: a text is new, and the text encoder is not there any more.
        ValueError: a request's own text is longer than the generator takes.
    """
    from derm_pipeline.generation import caption_requests, text_of_requests

    latents = latents_of(store, generator)
    embeddings = embeddings_of(latents)
    if embeddings is None:
        return list(requests), None
    training_set = store.get(latents.manifest.inputs["training_set"])
    if training_set is None:
        raise StoreError(f"the training set of {generator.reference} is not in {store.root} any more: run it again")
    rows, style = training_set.table(TRAINING_SET), training_set.manifest.settings[TOLD]
    modalities = rows["modality"].unique().to_pylist()
    told = caption_requests(
        requests,
        rows[TOLD].to_pylist(),
        {name: values_of(rows, name) for name in ("diagnosis", "skin_type", "sex", "age_band", "site")},
        style if style in STYLES else "rich",
        {"modality": modalities[0]} if len(modalities) == 1 and modalities[0] else {},
    )
    told = [replace(new, text=None) if one.text == "" else new for one, new in zip(requests, told, strict=True)]
    prompts = {text for one in requests for text in (one.text, one.negative_prompt) if text}

    def embed(texts: Sequence[str]) -> Mapping[str, Tensor]:
        from derm_pipeline.models.runtime import pick_device
        from derm_pipeline.models.text_encoder import TextEncoderReference, load_text_reference

        encoder = load_text_reference(TextEncoderReference.model_validate(latents.json(ENCODER)), pick_device())
        most = encoder.config.settings.max_tokens
        for text, num_tokens in zip(texts, encoder.num_tokens(texts), strict=True):
            if num_tokens > most and text in prompts:
                raise ValueError(f"the prompt {text[:80]!r} has {num_tokens} tokens; {most} can be told: shorten it")
        return encoder.embed(texts)

    return told, text_of_requests(told, embeddings, embed)
