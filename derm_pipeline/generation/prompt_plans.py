"""What text-to-image generators are asked for: prompts, each with its own settings, as the four systems had them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from derm_pipeline.captions.lesiongen import GUIDANCES, NUM_STEPS, condition_of, lesiongen_prompts, lesiongen_single
from derm_pipeline.captions.skin_diff import skin_diff_prompt
from derm_pipeline.generation.plan import (
    Cell,
    Origin,
    Prompting,
    SampleRequest,
    Sampling,
    SamplingConfig,
    plan_samples,
    sample_seed,
)
from derm_pipeline.generation.prompt_file import Prompt, parse_prompt, read_prompts
from derm_pipeline.records import Diagnosis, SkinType
from derm_pipeline.store import digest_of_file, digest_of_json


class PromptSampling(Sampling):
    """What the plans of prompts have in common."""

    plan: str
    """Which of them."""
    num_steps: int = Field(default=50, ge=1)
    """Steps of a sample, of those that are not left out where it begins from an image."""
    guidance: float = Field(default=7.5, ge=0, allow_inf_nan=False)
    """Classifier-free guidance; 1 is none."""
    negative_prompt: str | None = None
    """What guidance goes away from, where a prompt does not say so itself; None is the network's own null."""
    spacing: Literal["time", "angle"] = "time"
    """Where the network is asked: at evenly spread times of a DDPM law, as the systems' own schedulers do, or at the
    even angles of `law.grid`, which is better with few steps. A flow has one grid only."""

    @property
    def skin_types(self) -> tuple[SkinType, ...]:
        """Skin types that the generator is asked for by class: none, its prompts say what is wanted."""
        return ()

    def identity(self) -> dict[str, Any]:
        """The settings on which the samples depend; a file counts by what it holds."""
        return self.model_dump(mode="json")


class LesionGenSampling(PromptSampling):
    """LesionGen's generate.py: a prompt of size and skin tone for each condition."""

    plan: Literal["lesiongen"] = "lesiongen"
    mode: Literal["dataset", "single"] = "dataset"
    """dataset: each sample draws, by its own seed, one of 3 prompts, of `guidances` and of `steps`; single: all have
    the first prompt (small, on dark skin), `guidance` and `num_steps`."""
    num_samples: int = Field(default=70, ge=1)
    """Samples in all, the same number of each diagnosis; LesionGen makes 10 of each of seven."""
    guidances: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(default=GUIDANCES, min_length=1)
    """The guidance that a data set draws from."""
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=NUM_STEPS, min_length=1)
    """The numbers of steps that a data set draws from."""

    @property
    def most_steps(self) -> int:
        return max(self.steps) if self.mode == "dataset" else self.num_steps

    @property
    def least_samples(self) -> int:
        return self.num_samples

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> Self:
        fields = type(self).model_fields
        pairs = [("guidance", "guidances"), ("num_steps", "steps")]
        for name, other in pairs if self.mode == "dataset" else [pair[::-1] for pair in pairs]:
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} means nothing in mode {self.mode}: set {other}, or leave it out")
        return self


class PromptListSampling(PromptSampling):
    """Prompts that stand in the recipe, or in a file."""

    plan: Literal["prompts"] = "prompts"
    prompts: tuple[Prompt, ...] = ()
    """The prompts: words alone, words with options as kohya's ("... --n blurry --s 28"), or fields."""
    file: str | None = None
    """A text file of such lines, instead; see `prompt_file`."""
    diagnosis: Diagnosis | None = None
    """What samples show whose prompt does not say it; None where the generator learnt one diagnosis only."""
    samples_each: int = Field(default=1, ge=1)
    """Samples of every prompt."""

    @property
    def least_samples(self) -> int:
        return self.samples_each * max(1, len(self.prompts))

    @field_validator("prompts", mode="before")
    @classmethod
    def _lines_are_prompts(cls, prompts: Any) -> Any:
        if isinstance(prompts, Sequence) and not isinstance(prompts, str):
            return tuple(parse_prompt(one) if isinstance(one, str) else one for one in prompts)
        return prompts

    @model_validator(mode="after")
    def _has_prompts(self) -> Self:
        if bool(self.prompts) == (self.file is not None):
            raise ValueError("prompts or a file of them: one of the two")
        return self

    def identity(self) -> dict[str, Any]:
        said = self.model_dump(mode="json")
        return said | ({} if self.file is None else {"file": digest_of_file(Path(self.file))})


class CaptionSampling(PromptSampling):
    """Med-Art: captions of training images as prompts. Its sampler takes 50 steps and PixArt's guidance of 4.5."""

    plan: Literal["captions"] = "captions"
    guidance: float = Field(default=4.5, ge=0, allow_inf_nan=False)
    """Classifier-free guidance; 1 is none."""
    num_samples: int = Field(default=700, ge=1)
    """Samples in all, the same number of each diagnosis; each draws a caption of its diagnosis by its own seed."""

    @property
    def least_samples(self) -> int:
        return self.num_samples


class Img2ImgSampling(PromptSampling):
    """From Majority to Minority: every training image drawn anew on dark skin (`janet-sw/skin-diff`)."""

    plan: Literal["img2img"] = "img2img"
    strength: float = Field(default=0.5, gt=0, le=1)
    """Part of the steps that is taken: int(num_steps * strength), the last ones. Below 0.7 the skin's colour mostly
    stays, by that system's own note, so that the tone is measured in every sample."""
    guidance: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    """Classifier-free guidance; 1 is none."""
    num_steps: int = Field(default=100, ge=1)
    """Steps from pure noise, of which a part is taken."""
    samples_each: int = Field(default=5, ge=1)
    """Samples of every image."""
    target_types: tuple[SkinType, ...] = Field(default=(SkinType.V, SkinType.VI), min_length=1)
    """An image of one of these skin types keeps it; any other is given one of them, drawn by seed."""
    lesion: Literal["drawn", "kept", "kept_as_found"] = "drawn"
    """drawn: all of the image is drawn anew; kept: but for the lesion that the source's mask outlines; kept_as_found:
    but for the lesion that `captions.segmentation` finds."""
    max_images: int | None = Field(default=None, ge=1)
    """At most so many training images, chosen by seed; None is all."""

    @property
    def least_samples(self) -> int:
        return self.samples_each

    @model_validator(mode="after")
    def _takes_a_step(self) -> Self:
        if int(self.num_steps * self.strength) < 1:
            raise ValueError(f"strength {self.strength} of num_steps {self.num_steps} is no step at all: raise one")
        return self


PLANS = ("balanced", "fill", "lesiongen", "prompts", "captions", "img2img")
"""The names of all plans."""


def _plan_of(said: Any) -> Any:
    plan = said.get("plan", "balanced") if isinstance(said, Mapping) else getattr(said, "plan", None)
    return "balanced" if plan == "fill" else plan


AnySampling = Annotated[
    Annotated[SamplingConfig, Tag("balanced")]
    | Annotated[LesionGenSampling, Tag("lesiongen")]
    | Annotated[PromptListSampling, Tag("prompts")]
    | Annotated[CaptionSampling, Tag("captions")]
    | Annotated[Img2ImgSampling, Tag("img2img")],
    Discriminator(
        _plan_of,
        custom_error_type="unknown_plan",
        custom_error_message=f"plan should be one of {', '.join(PLANS)}",
    ),
]
"""What a recipe's samples are asked for by, told apart by `plan`."""


@dataclass(frozen=True)
class TrainingImage:
    """What a plan may know of an image that the generator learnt from."""

    sha256: str
    diagnosis: Diagnosis
    skin_type: SkinType | None
    caption: str


def plan_requests(
    config: SamplingConfig | PromptSampling,
    diagnoses: Sequence[Diagnosis],
    train_counts: Mapping[Cell, int],
    images: Sequence[TrainingImage] = (),
) -> list[SampleRequest]:
    """The samples that a recipe asks for, in order, numbered from 0.

    Args:
        config: The plan.
        diagnoses: Those that the generator learnt.
        train_counts: Training images of each cell: "fill" goes by them.
        images: The training images: "captions" and "img2img" go by them.

    Raises:
        FileNotFoundError: the file of prompts is not there.
        ValueError: it holds what is no prompt; a prompt without a diagnosis; no training image to go by.
    """
    if isinstance(config, SamplingConfig):
        return plan_samples(config, diagnoses, train_counts)
    planned: Callable[..., list[SampleRequest]] = _PLANNERS[type(config)]
    return planned(config, diagnoses, images)


def _drawn(purpose: str, seed: int | list[Any], num: int) -> int:
    """One of `num` places, by a seed."""
    return int(digest_of_json([purpose, seed])[:16], 16) % num


def _balanced(num_samples: int, seed: int, diagnoses: Sequence[Diagnosis]) -> list[SampleRequest]:
    return plan_samples(SamplingConfig(num_samples=num_samples, skin_types=(), seed=seed), diagnoses, {})


def _plan_lesiongen(
    config: LesionGenSampling, diagnoses: Sequence[Diagnosis], images: Sequence[TrainingImage]
) -> list[SampleRequest]:
    requests = []
    for request, diagnosis in _of_diagnoses(_balanced(config.num_samples, config.seed, diagnoses)):
        condition = condition_of(diagnosis)
        if config.mode == "single":
            one = lesiongen_single(condition)._replace(guidance=config.guidance, num_steps=config.num_steps)
        else:
            choices = lesiongen_prompts(condition, config.guidances, config.steps)
            one = choices[_drawn("lesiongen", request.seed, len(choices))]
        how = Prompting(config.negative_prompt, one.guidance, one.num_steps, target_tone=one.tone)
        requests.append(replace(request, text=one.text, prompting=how))
    return requests


def _plan_captions(
    config: CaptionSampling, diagnoses: Sequence[Diagnosis], images: Sequence[TrainingImage]
) -> list[SampleRequest]:
    by_diagnosis = {diagnosis: [image for image in images if image.diagnosis == diagnosis] for diagnosis in diagnoses}
    without = [diagnosis.value for diagnosis, found in by_diagnosis.items() if not found]
    if without:
        raise ValueError(f"no training image of {', '.join(without)} has a caption to ask with")
    requests = []
    for request, diagnosis in _of_diagnoses(_balanced(config.num_samples, config.seed, diagnoses)):
        images_of_it = by_diagnosis[diagnosis]
        image = images_of_it[_drawn("caption", request.seed, len(images_of_it))]
        tone = image.skin_type.tone if image.skin_type else None
        how = Prompting(config.negative_prompt, target_tone=tone)
        requests.append(replace(request, text=image.caption, skin_type=image.skin_type, prompting=how))
    return requests


def _of_diagnoses(requests: Sequence[SampleRequest]) -> list[tuple[SampleRequest, Diagnosis]]:
    return [(request, request.diagnosis) for request in requests if request.diagnosis is not None]


def _plan_prompts(
    config: PromptListSampling, diagnoses: Sequence[Diagnosis], images: Sequence[TrainingImage]
) -> list[SampleRequest]:
    prompts = config.prompts if config.file is None else read_prompts(Path(config.file))
    _check_sizes(prompts)
    requests: list[SampleRequest] = []
    for prompt in prompts:
        diagnosis = prompt.diagnosis or config.diagnosis or (diagnoses[0] if len(diagnoses) == 1 else None)
        if diagnosis is None:
            raise ValueError(f"what does {prompt.text!r} show? Set synthetic_dataset.diagnosis, or that of the prompt")
        size = None if prompt.width_px is None or prompt.height_px is None else (prompt.width_px, prompt.height_px)
        tone = prompt.skin_type.tone if prompt.skin_type else None
        negative = config.negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt
        how = Prompting(negative, prompt.guidance, prompt.num_steps, size, target_tone=tone)
        for copy in range(config.samples_each):
            number = len(requests)
            seed = sample_seed(config.seed, number) if prompt.seed is None else _further_seed(prompt.seed, copy)
            requests.append(SampleRequest(number, seed, diagnosis, prompt.skin_type, text=prompt.text, prompting=how))
    return requests


def _check_sizes(prompts: Sequence[Prompt]) -> None:
    sizes = {f"{one.width_px} x {one.height_px}" if one.width_px else "the generator's own" for one in prompts}
    if len(sizes) > 1:
        raise ValueError(
            f"prompts of several sizes ({', '.join(sorted(sizes))}), but the images of one dataset have one: make a "
            "recipe for each"
        )


def _further_seed(seed: int, copy: int) -> int:
    return seed if copy == 0 else sample_seed(seed, copy)


def _plan_img2img(
    config: Img2ImgSampling, diagnoses: Sequence[Diagnosis], images: Sequence[TrainingImage]
) -> list[SampleRequest]:
    wanted = [image for image in images if image.diagnosis in set(diagnoses)]
    if not wanted:
        raise ValueError(f"no training image of {', '.join(diagnoses)} to begin from")
    if config.max_images is not None:
        chosen = sorted(wanted, key=lambda image: digest_of_json(["img2img", config.seed, image.sha256]))
        kept = {image.sha256 for image in chosen[: config.max_images]}
        wanted = [image for image in wanted if image.sha256 in kept][: config.max_images]
    requests: list[SampleRequest] = []
    for image in wanted:
        target = image.skin_type
        if target not in config.target_types:
            place = _drawn("tone", [config.seed, image.sha256], len(config.target_types))
            target = config.target_types[place]
        text = skin_diff_prompt(image.diagnosis.value, target)
        origin = Origin(image.sha256, config.strength, keeps_lesion=config.lesion != "drawn")
        how = Prompting(config.negative_prompt, origin=origin, target_tone=target.tone)
        for _ in range(config.samples_each):
            number = len(requests)
            seed = sample_seed(config.seed, number)
            requests.append(SampleRequest(number, seed, image.diagnosis, target, text=text, prompting=how))
    return requests


_PLANNERS: dict[type[PromptSampling], Callable[..., list[SampleRequest]]] = {
    LesionGenSampling: _plan_lesiongen,
    PromptListSampling: _plan_prompts,
    CaptionSampling: _plan_captions,
    Img2ImgSampling: _plan_img2img,
}
