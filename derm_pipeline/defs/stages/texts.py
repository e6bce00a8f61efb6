"""Captions as a condition: their embeddings in the latents, read by training, sampling and `derm generate`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from derm_pipeline.captions.metadata import STYLES
from derm_pipeline.defs.stages.fitting import latents_of, values_of
from derm_pipeline.defs.stages.sets import TOLD, TRAINING_SET
from derm_pipeline.store import Artifact, Build, Store, StoreError

if TYPE_CHECKING:
    from torch import Tensor

    from derm_pipeline.generation import EmbedText, SampleRequest
    from derm_pipeline.latents import Embeddings
    from derm_pipeline.models.pretrained.config import Part
    from derm_pipeline.recipes.model import Recipe

TEXTS = "text"
"""Folder of the embeddings in the latents, there where the generator is told text."""
ENCODER = f"{TEXTS}/encoder.json"

OnProgress = Callable[[int, int], None]


def text_settings(recipe: Recipe) -> dict[str, object]:
    """What the latents depend on where they hold embeddings of what the generator is told; nothing else.

    They hold none where a stage of a pretrained generator changes what a text means: they would be told to nobody.
    """
    from derm_pipeline.training.fine_tuning_settings import FineTuning
    from derm_pipeline.training.trainee import trains_text

    config = recipe.generator
    if isinstance(config, FineTuning):
        if any(trains_text(stage) for stage in config.stages):
            return {}
        return {"text": {"base": config.base.identity(), "further": list(config.further_texts)}}
    return {} if config.text is None else {"text": config.text.encoder.identity()}


def embed_captions(
    build: Build, recipe: Recipe, tables: Sequence[pa.Table], on_progress: OnProgress | None = None
) -> None:
    """Write the embeddings of the captions that are told of these rows into the latents; nothing where none are."""
    from derm_pipeline.latents import write_embeddings

    if not text_settings(recipe):
        return
    encoder = _encoder_of(recipe)
    captions = list(dict.fromkeys(caption for table in tables for caption in table[TOLD].to_pylist()))
    num_reused = write_embeddings(
        build.directory / TEXTS,
        [*captions, *encoder.further],
        encoder.embed,
        encoder=encoder.identity,
        previous=build.previous.directory / TEXTS if build.previous else None,
        on_progress=on_progress,
    )
    build.write_json(ENCODER, encoder.reference)
    build.counts.update(num_texts=len(captions), num_texts_cut=encoder.num_cut(captions), num_texts_reused=num_reused)


@dataclass(frozen=True)
class _Encoder:
    """What makes embeddings of captions, whatever generator they are for."""

    embed: Callable[[Sequence[str]], Mapping[str, Tensor]]
    identity: Any
    reference: dict[str, Any]
    """What is kept of it beside the embeddings."""
    num_cut: Callable[[Sequence[str]], int]
    """How many texts are longer than it takes."""
    further: tuple[str, ...] = ()
    """Texts that are told beside the captions."""


def _encoder_of(recipe: Recipe) -> _Encoder:
    from derm_pipeline.models.pretrained.base import load_base
    from derm_pipeline.models.runtime import pick_device
    from derm_pipeline.models.text_encoder import load_text_encoder
    from derm_pipeline.training.fine_tuning_settings import FineTuning
    from derm_pipeline.training.stage_embeddings import num_cut

    config = recipe.generator
    if isinstance(config, FineTuning):
        parts: tuple[Part, ...] = ("text",)
        base = load_base(config.base, pick_device(), parts=parts)
        reference = base.reference.model_dump(mode="json")
        cut = partial(num_cut, base)
        return _Encoder(base.embed, base.text_identity, reference, cut, config.further_texts)
    assert config.text is not None  # else nothing is told
    encoder, most = load_text_encoder(config.text.encoder, pick_device()), config.text.encoder.max_tokens
    return _Encoder(
        encoder.embed,
        encoder.config.identity(),
        encoder.config.model_dump(mode="json"),
        lambda captions: sum(num > most for num in encoder.num_tokens(captions)),
    )


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

    A request without a text gets a caption of a training image like it; an empty text is told as none. A generator that
    is told texts only is told no classes: what it was asked for as such labels the samples.

    Raises:
        StoreError: the latents from which the generator learnt, or their training set, are gone.
        FileNotFoundError: a text is new, and the text encoder is not there any more.
        ValueError: a request's own text is longer than the generator takes.
    """
    from derm_pipeline.generation import Prompting
    from derm_pipeline.models.generator import GeneratorSpec

    latents = latents_of(store, generator)
    embeddings, network = embeddings_of(latents), GeneratorSpec.load(generator.directory).network
    if embeddings is None and network.kind != "pretrained":
        return list(requests), None
    training_set = store.get(latents.manifest.inputs["training_set"])
    if training_set is None:
        raise StoreError(f"the training set of {generator.reference} is not in {store.root} any more: run it again")
    told = _with_captions(training_set, requests)
    learnt = set(training_set.table(TRAINING_SET, [TOLD])[TOLD].to_pylist())
    if network.kind == "pretrained":
        told = [one if one.prompting else replace(one, prompting=Prompting()) for one in told]
        return told, _texts_of_base(generator, embeddings, learnt)
    assert embeddings is not None
    prompts = {text for one in requests for text in (one.text, one.negative_prompt) if text}
    return told, _texts_of_encoder(latents, embeddings, told, prompts)


def _with_captions(training_set: Artifact, requests: Sequence[SampleRequest]) -> list[SampleRequest]:
    from derm_pipeline.generation import caption_requests

    rows, style = training_set.table(TRAINING_SET), training_set.manifest.settings[TOLD]
    modalities = rows["modality"].unique().to_pylist()
    told = caption_requests(
        requests,
        rows[TOLD].to_pylist(),
        {name: values_of(rows, name) for name in ("diagnosis", "skin_type", "sex", "age_band", "site")},
        style if style in STYLES else "rich",
        {"modality": modalities[0]} if len(modalities) == 1 and modalities[0] else {},
    )
    return [replace(new, text=None) if one.text == "" else new for one, new in zip(requests, told, strict=True)]


def _texts_of_encoder(
    latents: Artifact, embeddings: Embeddings, told: Sequence[SampleRequest], prompts: Collection[str]
) -> EmbedText:
    from derm_pipeline.generation import text_of_requests

    def embed(texts: Sequence[str]) -> Mapping[str, Tensor]:
        from derm_pipeline.models.runtime import pick_device
        from derm_pipeline.models.text_encoder import TextEncoderReference, load_text_reference

        encoder = load_text_reference(TextEncoderReference.model_validate(latents.json(ENCODER)), pick_device())
        most = encoder.config.settings.max_tokens
        for text, num_tokens in zip(texts, encoder.num_tokens(texts), strict=True):
            if num_tokens > most and text in prompts:
                raise ValueError(f"the prompt {text[:80]!r} has {num_tokens} tokens; {most} can be told: shorten it")
        return encoder.embed(texts)

    return text_of_requests(told, embeddings, embed)


def _texts_of_base(generator: Artifact, embeddings: Embeddings | None, learnt: Collection[str]) -> EmbedText:
    """Embeds texts as the generator was trained to be told them; its text encoders are loaded when one is needed."""
    from derm_pipeline.generation import looked_up_first

    def load() -> EmbedText:
        from derm_pipeline.models.generator import load_text
        from derm_pipeline.models.runtime import pick_device

        base = load_text(generator.directory, pick_device())

        def embed(texts: Sequence[str]) -> dict[str, Tensor]:
            for text, num_cut in zip(texts, base.tokenise(texts).num_cut, strict=True):
                if num_cut and text not in learnt:
                    raise ValueError(
                        f"the prompt {text[:80]!r} has {num_cut} tokens more than the {base.max_tokens} that can be "
                        "told: shorten it"
                    )
            return base.embed(texts)

        return embed

    return looked_up_first(embeddings, load)
