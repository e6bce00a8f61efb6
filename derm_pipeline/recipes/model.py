"""The typed model of a recipe: every stage's own config, composed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from derm_pipeline.evaluation.classifiers import ClassifierConfig
from derm_pipeline.evaluation.fidelity import FidelityConfig
from derm_pipeline.evaluation.groups import GroupConfig
from derm_pipeline.evaluation.memorisation import CopyConfig
from derm_pipeline.generation import SamplingConfig
from derm_pipeline.latents import LatentConfig
from derm_pipeline.sources import SOURCES
from derm_pipeline.training.objectives import AutoencoderTraining, GeneratorTraining
from derm_pipeline.training.training_set import TrainingSetConfig


class Recipe(BaseModel):
    """One named, complete experiment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """The file's name; lower case, digits and underscores, since it is a partition and a job."""
    title: str
    """What it is, in a sentence."""
    sources: tuple[str, ...] = Field(min_length=1)
    """The datasets that it sees."""
    training_set: TrainingSetConfig = TrainingSetConfig()
    autoencoder: AutoencoderTraining
    latents: LatentConfig = LatentConfig()
    generator: GeneratorTraining
    synthetic_dataset: SamplingConfig = SamplingConfig()
    classifiers: ClassifierConfig = ClassifierConfig()
    fidelity: FidelityConfig = FidelityConfig()
    copies: CopyConfig = CopyConfig()
    group_metrics: GroupConfig = GroupConfig()

    @field_validator("sources")
    @classmethod
    def _known_sources(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [source for source in sources if source not in SOURCES]
        if unknown:
            raise ValueError(f"unknown source {unknown[0]!r}; there are {', '.join(SOURCES)}")
        return sources


def explain(error: ValidationError, path: Path) -> str:
    """The first few complaints, each with its key and what is allowed there."""
    lines = []
    for complaint in error.errors()[:5]:
        key = ".".join(str(part) for part in complaint["loc"])
        message = complaint["msg"]
        if complaint["type"] == "extra_forbidden":
            message = f"unknown key; allowed here: {', '.join(_allowed_keys(complaint['loc'][:-1]))}"
        lines.append(f"{path}: {key or '(top)'}: {message}")
    return "\n".join(lines)


def _allowed_keys(location: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # the name of a union's member
        nested = [found for found in (field.annotation, *get_args(field.annotation)) if _is_model(found)]
        if nested:
            model = nested[0]
    return [name for name in model.model_fields if name != "name"]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
