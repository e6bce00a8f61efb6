"""The typed model of a recipe: every stage's own config, composed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from derm_pipeline.evaluation.classifiers import ClassifierConfig
from derm_pipeline.evaluation.fidelity import FidelityConfig
from derm_pipeline.evaluation.groups import GroupConfig
from derm_pipeline.evaluation.memorisation import CopyConfig
from derm_pipeline.generation import AnySampling, PromptSampling, SamplingConfig
from derm_pipeline.latents import LatentConfig
from derm_pipeline.models.pretrained.config import BaseVaeConfig
from derm_pipeline.models.pretrained_vae import PretrainedVaeConfig
from derm_pipeline.models.reconstruction import ReconstructionMinimum
from derm_pipeline.recipes import NAME
from derm_pipeline.sources import SOURCES
from derm_pipeline.training.fine_tuning_settings import FineTuning
from derm_pipeline.training.settings import AutoencoderTraining, DiTTraining, UNetTraining
from derm_pipeline.training.training_set import TrainingSetConfig


class Recipe(BaseModel):
    """One named, complete experiment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME)
    """The file's name; lower case, digits and underscores, since it is a partition and a job."""
    title: str
    """What it is, in a sentence."""
    sources: tuple[str, ...] = Field(min_length=1)
    """The datasets that it sees."""
    training_set: TrainingSetConfig = TrainingSetConfig()
    autoencoder: Annotated[AutoencoderTraining | PretrainedVaeConfig | BaseVaeConfig, Field(discriminator="kind")]
    reconstruction: ReconstructionMinimum = ReconstructionMinimum()
    """How well training images must come back from the autoencoder before latents are made of them."""
    latents: LatentConfig = LatentConfig()
    generator: Annotated[DiTTraining | UNetTraining | FineTuning, Field(discriminator="kind")]
    synthetic_dataset: AnySampling = SamplingConfig()
    classifiers: ClassifierConfig = ClassifierConfig()
    fidelity: FidelityConfig = FidelityConfig()
    copies: CopyConfig = CopyConfig()
    group_metrics: GroupConfig = GroupConfig()

    @field_validator("sources")
    @classmethod
    def _known_sources(cls, sources: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        known = (info.context or {}).get("sources") or SOURCES
        unknown = [source for source in sources if source not in known]
        if unknown:
            raise ValueError(f"unknown source {unknown[0]!r}; there are {', '.join(known)}")
        twice = sorted({source for source in sources if sources.count(source) > 1})
        if twice:
            raise ValueError(f"the source {twice[0]} is named more than once")
        return sources

    @field_validator("autoencoder", "generator", mode="before")
    @classmethod
    def _usual_kind(cls, settings: Any, info: ValidationInfo) -> Any:
        if isinstance(settings, Mapping) and "kind" not in settings:
            return {"kind": "dit" if info.field_name == "generator" else "trained", **settings}
        return settings

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        """What would otherwise fail in a later stage, after the work of the earlier ones."""
        if isinstance(self.generator, FineTuning):
            _check_fine_tuning(self)
        elif isinstance(self.autoencoder, BaseVaeConfig):
            raise ValueError(
                "autoencoder: kind base goes with a generator of kind pretrained; take trained or pretrained"
            )
        elif isinstance(self.autoencoder, PretrainedVaeConfig):  # its files say, when they are read; most are so
            check_network(self, downsampling=8, channels=4)
        else:
            network = self.autoencoder.network
            check_network(self, network.downsampling, network.latent_channels)
        if self.synthetic_dataset.image_format == "webp":
            raise ValueError("synthetic_dataset.image_format: webp is for `derm generate`; a recipe takes png or jpeg")
        if not isinstance(self.generator, FineTuning):
            _check_sampling(self, self.generator)
            _check_asked(self, self.generator)
        if "real" not in self.classifiers.arms:
            raise ValueError("classifiers.arms must name real: all else is held against it")
        if self.classifiers.width % 8:
            raise ValueError(f"classifiers.width {self.classifiers.width} is not a multiple of 8")
        return self

    @property
    def told_caption(self) -> str | None:
        """The style of the captions that the generator is told; None where it is told none."""
        if isinstance(self.generator, FineTuning):
            return self.training_set.caption
        text = self.generator.text
        return None if text is None else text.caption or self.training_set.caption

    def resolved_autoencoder(self) -> AutoencoderTraining | PretrainedVaeConfig:
        """The autoencoder's settings: the base's own, where the recipe says so, found by the base's files.

        Raises:
            FileNotFoundError, ValueError: the base is not there, or cannot be used.
        """
        choice = self.autoencoder
        if not isinstance(choice, BaseVaeConfig):
            return choice
        from derm_pipeline.models.pretrained.base import vae_config

        assert isinstance(self.generator, FineTuning)  # as checked
        found = vae_config(self.generator.base)
        return found if choice.dtype is None else found.model_copy(update={"dtype": choice.dtype})


def check_network(recipe: Recipe, downsampling: int, channels: int) -> None:
    """Refuse a generator that does not fit the latents of its autoencoder; a base's is checked when it is found.

    Args:
        recipe: Whose generator.
        downsampling: Pixels per latent cell, along each side.
        channels: Channels of a latent.

    Raises:
        ValueError: with what would fit.
    """
    size_px, generator = recipe.latents.size_px, recipe.generator
    patch = generator.patch if isinstance(generator, DiTTraining) else 1
    if size_px % (downsampling * patch):
        raise ValueError(
            f"latents.size_px {size_px} is not a multiple of {downsampling * patch} (the autoencoder's downsampling "
            f"{downsampling}{'' if isinstance(generator, FineTuning) else f' x generator.patch {patch}'})"
        )
    if isinstance(generator, FineTuning):
        return
    try:
        told: dict[str, int] = dict.fromkeys(generator.conditions, 1)
        generator.network(size_px // downsampling, channels, told, text_width=1)  # a text's, its files say
    except ValidationError as error:
        said = "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
        raise ValueError(f"generator: {said}") from error


def _check_fine_tuning(recipe: Recipe) -> None:
    """Refuse what a generator of a pretrained base could not do."""
    if isinstance(recipe.autoencoder, AutoencoderTraining):
        raise ValueError("autoencoder: a pretrained generator knows the latents of its base: take {kind: base}")
    if not isinstance(recipe.synthetic_dataset, PromptSampling):
        raise ValueError(
            f"synthetic_dataset.plan {recipe.synthetic_dataset.plan}: a pretrained generator is told texts only: take "
            "lesiongen, prompts, captions or img2img"
        )


def _check_sampling(recipe: Recipe, generator: DiTTraining | UNetTraining) -> None:
    """Refuse samples that the trained network could not give."""
    sampling, law = recipe.synthetic_dataset, generator.law
    if sampling.solver == "ddpm" and law.kind != "ddpm":
        raise ValueError('synthetic_dataset.solver: "ddpm" needs generator.law {kind: ddpm}; a flow takes "dpm2m"')
    by_time = isinstance(sampling, PromptSampling) and sampling.spacing == "time"
    if law.kind == "ddpm" and (by_time or sampling.solver == "ddpm") and sampling.most_steps > law.num_steps:
        raise ValueError(f"synthetic_dataset.num_steps {sampling.most_steps}: the law has {law.num_steps} steps")
    hides = max(generator.condition_dropout, generator.condition_dropout_each)
    if sampling.guidance != 1 and hides == 0:
        raise ValueError(
            "generator.condition_dropout must be above 0, or synthetic_dataset.guidance be 1: guidance goes by a "
            "prediction that was trained with its conditions hidden"
        )


def _check_asked(recipe: Recipe, generator: DiTTraining | UNetTraining) -> None:
    """Refuse to ask for samples by what the generator is not told."""
    sampling, told = recipe.synthetic_dataset, set(generator.conditions)
    if isinstance(sampling, PromptSampling):
        if generator.text is None:
            raise ValueError(f"synthetic_dataset.plan {sampling.plan} asks in words, so generator.text must be set")
        return
    asked = {"diagnosis"} | ({"skin_type"} if sampling.skin_types else set())
    if not asked <= told:
        raise ValueError(
            f"the samples are asked for by {' and '.join(sorted(asked))}, so generator.conditions must name that"
            + (" (or synthetic_dataset.skin_types be [])" if "diagnosis" in told else "")
        )


def explain(error: ValidationError, path: Path) -> str:
    """The first few complaints, each with its key and what is allowed there."""
    lines = []
    for complaint in error.errors()[:5]:
        keys, _ = _walked(complaint["loc"])
        message = complaint["msg"].removeprefix("Value error, ")
        if complaint["type"] == "extra_forbidden":
            _, model = _walked(complaint["loc"][:-1])
            allowed = ", ".join(name for name in model.model_fields if name != "name")
            message = f"unknown key; allowed here: {allowed}"
        key = ".".join(keys)
        lines.append(f"{path}: {key + ': ' if key else ''}{message}")
    return "\n".join(lines)


def _walked(location: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel]]:
    """The keys of a location, without the tags of unions (which nobody wrote as a key), and the model it lies in."""
    members: list[type[BaseModel]] = [Recipe]
    keys = []
    for part in location:
        if isinstance(part, str) and len(members) > 1:  # the tag that a union's member goes by
            members = [found for found in members if part in _tags_of(found)] or members[:1]
            continue
        keys.append(str(part))
        field = members[0].model_fields.get(str(part)) if members else None
        if field is not None:
            members = _models_in(field.annotation) or members
    return keys, members[0]


def _tags_of(model: type[BaseModel]) -> list[Any]:
    return [model.model_fields[name].default for name in ("kind", "plan") if name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a type is made of, on its outermost level."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
