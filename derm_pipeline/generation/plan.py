"""Which samples to draw: the settings, one request a sample, and how many of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from derm_pipeline.models.diffusion import Solver
from derm_pipeline.models.generator import GeneratorSpec
from derm_pipeline.models.runtime import Precision
from derm_pipeline.records import Diagnosis, SkinTone, SkinType
from derm_pipeline.store import digest_of_json

Cell = tuple[Diagnosis, SkinType | None]
"""What can be asked of a generator: a diagnosis, and a skin type where it is told one."""

ImageFormat = Literal["png", "webp", "jpeg"]
"""How an image file is written; png and webp keep every pixel."""

SUFFIXES: dict[ImageFormat, str] = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}


class Sampling(BaseModel):
    """How samples are drawn, whichever they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_steps: int = Field(default=15, ge=1)
    """Evaluations of the network for a sample ("heun" takes nearly twice as many)."""
    solver: Solver = "dpm2m"
    """The sampler."""
    guidance: float = Field(default=1.5, ge=0, allow_inf_nan=False)
    """Classifier-free guidance; 1 is none, and halves the work."""
    guidance_interval: tuple[float, float] | None = None
    """Guide between these noise levels sigma / alpha only (0 is clean), which saves the other half; None is all."""
    precision: Precision = "auto"
    """Arithmetic of the networks; auto is bf16 where the device computes in it."""
    compile: bool = False
    """Whether the networks are compiled first: minutes, which thousands of samples on a GPU win back."""
    batch_size: int = Field(default=64, ge=1)
    """Samples drawn and kept at once; on the CPU it changes no sample, on a GPU the last bits at most."""
    seed: int = 0
    """Every sample's own seed follows from it and the sample's number."""
    image_format: ImageFormat = "png"
    """Format of the image files. The pipeline's own later stages read png and jpeg."""
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    """Quality of jpeg files, colours at full resolution."""

    @model_validator(mode="after")
    def _interval_holds_a_level(self) -> Self:
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError(f"guidance_interval {self.guidance_interval} holds no noise level; give 0 <= low < high")
        return self

    @property
    def most_steps(self) -> int:
        """The most steps that the settings ask for."""
        return self.num_steps

    @property
    def least_samples(self) -> int:
        """As many samples as the settings alone promise; a plan may find that there are more."""
        return 1


class SamplingConfig(Sampling):
    """Which samples a recipe asks for by their conditions, and how they are drawn."""

    plan: Literal["balanced", "fill"] = "balanced"
    """balanced: every diagnosis (and skin type) equally often; fill: more of what the training set has few of."""
    num_samples: int = Field(default=700, ge=1)
    """Samples in all."""
    skin_types: tuple[SkinType, ...] = tuple(SkinType)
    """Skin types to ask for; none where the generator is not told the skin type."""

    @property
    def least_samples(self) -> int:
        return self.num_samples


@dataclass(frozen=True)
class Origin:
    """The image that a sample begins from: img2img."""

    sha256: str
    """Of the image's file."""
    strength: float
    """Part of the steps that is taken, the last ones, (0, 1]: see `models.diffusion.Start`."""
    keeps_lesion: bool = False
    """Whether its lesion stays as it is, so that the skin alone is drawn anew."""


@dataclass(frozen=True)
class Prompting:
    """How a sample is drawn that is asked for by a prompt; None is as the settings say."""

    negative_prompt: str | None = None
    """What guidance goes away from; None is the network's own null."""
    guidance: float | None = None
    num_steps: int | None = None
    size_px: tuple[int, int] | None = None
    """Width and height; None is the size that the generator learnt."""
    origin: Origin | None = None
    """The image that it begins from; None is pure noise."""
    target_tone: SkinTone | None = None
    """The skin tone that the prompt asks for."""


@dataclass(frozen=True)
class SampleRequest:
    """One sample to be drawn."""

    number: int
    seed: int
    diagnosis: Diagnosis | None
    """None where a text alone says what is wanted."""
    skin_type: SkinType | None
    further: tuple[tuple[str, str], ...] = ()
    """Other conditions and their values, as the generator calls them."""
    text: str | None = None
    """The caption that is told, of a generator that is told text."""
    prompting: Prompting | None = None
    """Where the text is a prompt, which alone says what is wanted: diagnosis and skin type label the sample, and are
    told as classes only to a generator that is told classes beside the text."""

    def told(self, condition: str) -> str | None:
        """The value of a condition; None where nothing is told, which is its null class."""
        if condition == "diagnosis":
            return None if self.diagnosis is None else self.diagnosis.value
        if condition == "skin_type":
            return None if self.skin_type is None else str(self.skin_type.value)
        return dict(self.further).get(condition)

    @property
    def conditions(self) -> tuple[str, ...]:
        """What the generator is told by class, by name; a prompt alone asks for no class."""
        if self.prompting is not None:
            return tuple(name for name, _ in self.further)
        diagnosis = ("diagnosis",) if self.diagnosis is not None else ()
        skin_type = ("skin_type",) if self.skin_type is not None else ()
        return (*diagnosis, *skin_type, *(name for name, _ in self.further))

    @property
    def prompt(self) -> str:
        """What the generator is told, in full."""
        if self.prompting is not None:
            return self.text or ""
        told = [f"{name}={self.told(name)}" for name in self.conditions]
        return ", ".join([*told, *([f"text={self.text}"] if self.text is not None else [])])

    @property
    def negative_prompt(self) -> str | None:
        """What guidance goes away from; None is the network's own null."""
        return self.prompting.negative_prompt if self.prompting else None

    @property
    def origin(self) -> Origin | None:
        """The image that it begins from."""
        return self.prompting.origin if self.prompting else None

    @property
    def identity(self) -> list[Any]:
        """What its pixels follow from beside settings and weights, as JSON."""
        if self.prompting is None:
            return [self.seed, self.prompt]
        return [self.seed, self.prompt, asdict(self.prompting), self.told("diagnosis"), self.told("skin_type")]

    @property
    def file_name(self) -> str:
        return self.file_as("png")

    def file_as(self, image_format: ImageFormat) -> str:
        """The file's name within its dataset."""
        return f"images/{self.number:06d}{SUFFIXES[image_format]}"


class Manner(NamedTuple):
    """What all samples of one batch must have in common."""

    num_steps: int
    guidance: float
    size_px: tuple[int, int] | None
    strength: float | None
    """None where samples begin from noise."""
    keeps_lesion: bool


def manner_of(request: SampleRequest, config: Sampling) -> Manner:
    """How a sample is drawn: as it says itself, else as the settings say."""
    how, origin = request.prompting, request.origin
    num_steps, guidance = config.num_steps, config.guidance
    if how is not None:
        num_steps = num_steps if how.num_steps is None else how.num_steps
        guidance = guidance if how.guidance is None else how.guidance
    strength, keeps = (None, False) if origin is None else (origin.strength, origin.keeps_lesion)
    return Manner(num_steps, guidance, how.size_px if how else None, strength, keeps)


def plan_samples(
    config: SamplingConfig, diagnoses: Sequence[Diagnosis], train_counts: Mapping[Cell, int]
) -> list[SampleRequest]:
    """The samples of these diagnoses to draw, in order, given how many training images each cell has.

    balanced spreads `num_samples` evenly over the diagnoses and, within each, over the skin types. fill gives every
    cell a part in proportion to what it lacks of the fullest cell that is asked for; where none lacks anything, it is
    balanced. Without skin types to ask for, a diagnosis' images of every skin type count together.
    """
    skin_types: tuple[SkinType | None, ...] = config.skin_types or (None,)
    cells: list[Cell] = [(diagnosis, skin_type) for diagnosis in diagnoses for skin_type in skin_types]
    lacking = dict.fromkeys(cells, 1.0)
    if config.plan == "fill":
        there = {cell: _num_there(cell, train_counts) for cell in cells}
        most = max(there.values())
        if any(count < most for count in there.values()):
            lacking = {cell: float(most - count) for cell, count in there.items()}
    counts = _apportion(config.num_samples, lacking)
    requests: list[SampleRequest] = []
    for cell in cells:
        for _ in range(counts[cell]):
            number = len(requests)
            requests.append(SampleRequest(number, sample_seed(config.seed, number), *cell))
    return requests


def _num_there(cell: Cell, train_counts: Mapping[Cell, int]) -> int:
    diagnosis, skin_type = cell
    if skin_type is not None:
        return train_counts.get(cell, 0)
    return sum(count for (other, _), count in train_counts.items() if other == diagnosis)


def _apportion(total: int, weights: Mapping[Cell, float]) -> Counter[Cell]:
    """Whole numbers in proportion to the weights that sum to `total`: largest remainders, diagnoses taking turns."""
    scale = total / sum(weights.values())
    shares = {cell: weight * scale for cell, weight in weights.items()}
    counts = Counter({cell: int(share) for cell, share in shares.items()})
    turn = {cell: place for place, cell in enumerate(sorted(shares, key=lambda cell: (cell[1] or 0, cell[0])))}
    order = sorted(shares, key=lambda cell: (-round(shares[cell] - int(shares[cell]), 9), turn[cell]))
    for cell in order[: total - sum(counts.values())]:
        counts[cell] += 1
    return counts


def sample_seed(seed: int, number: int) -> int:
    """The seed of sample `number`: 63 bits of a digest, so that neighbours are unrelated."""
    return int(digest_of_json(["sample", seed, number])[:16], 16) >> 1


def requests_of_cells(
    diagnoses: Sequence[Diagnosis | None],
    skin_types: Sequence[SkinType | None],
    count: int,
    seed: int,
    *,
    further: Mapping[str, str] | None = None,
    text: str | None = None,
    same_noise: bool = False,
) -> list[SampleRequest]:
    """`count` samples of every diagnosis with every skin type, cell after cell.

    Args:
        diagnoses: Those asked for; None is "not told".
        skin_types: Those asked for; None is "not told".
        count: Samples of each cell, at least 1.
        seed: Every sample's own seed follows from it.
        further: Other conditions, the same for all.
        text: The caption that is told of all, to a generator that is told text.
        same_noise: Whether the i-th sample of every cell has the same seed, for comparison side by side.
    """
    told = tuple((further or {}).items())
    cells = [(diagnosis, skin_type) for diagnosis in diagnoses for skin_type in skin_types]
    requests = []
    for number in range(len(cells) * count):
        drawn_as = number % count if same_noise else number
        requests.append(SampleRequest(number, sample_seed(seed, drawn_as), *cells[number // count], told, text))
    return requests


def num_train_images(request: SampleRequest, spec: GeneratorSpec) -> int | None:
    """How many training images show all that a sample is told; None of a prompt, or a generator that does not say."""
    if request.prompting is not None:
        return None
    told = {name: request.told(name) for name in request.conditions}
    return spec.num_images(told) if spec.seen else None


def num_unseen(requests: Sequence[SampleRequest], spec: GeneratorSpec) -> int | None:
    """How many samples are told what no training image shows together; None of a generator that does not say."""
    prompts = Counter(request.prompt for request in requests)
    of_prompt = {request.prompt: request for request in requests}
    if not spec.seen:
        return None
    return sum(prompts[prompt] for prompt, request in of_prompt.items() if num_train_images(request, spec) == 0)


def diagnosis_called(words: str, known: Sequence[Diagnosis]) -> Diagnosis:
    """The diagnosis of these that goes by a code ("mel") or in words ("Melanoma", "allergic contact dermatitis").

    Raises:
        ValueError: none of them does, with those there are.
    """
    said = " ".join(words.replace("_", " ").casefold().split())
    for diagnosis in known:
        if said in (diagnosis.value.replace("_", " "), diagnosis.phrase.casefold()):
            return diagnosis
    names = ", ".join(f"{diagnosis.value} ({diagnosis.phrase})" for diagnosis in known) or "none"
    raise ValueError(f"{words!r} is not a diagnosis that this generator is told; it knows {names}")
