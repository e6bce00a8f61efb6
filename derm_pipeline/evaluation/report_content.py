"""What a report says: plain data, put together by whoever knows where it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from derm_pipeline.images import Pixels

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class HairExamples:
    """Images (n, h, w, 3), the same with their hair masks laid over, and the share of hairy images among num_images."""

    images: Pixels
    overlaid: Pixels
    hairy_fraction: float
    num_images: int


@dataclass(frozen=True)
class CaptionExample:
    """One image (h, w, 3) and what the two captioners say of it; None where there is no such caption."""

    image: Pixels
    metadata: str | None
    visual: str | None


@dataclass(frozen=True)
class Reconstructions:
    """Images (n, h, w, 3), what the autoencoder makes of them, and its mean PSNR over num_images held-out images."""

    images: Pixels
    rebuilt: Pixels
    psnr_db: float | None = None
    num_images: int | None = None


@dataclass(frozen=True)
class ComparisonRow:
    """Real images and samples (k, h, w, 3) of one diagnosis, each with a label such as its skin type."""

    diagnosis: str
    real: Pixels
    real_labels: Sequence[str]
    samples: Pixels
    sample_labels: Sequence[str]


@dataclass(frozen=True)
class LossCurve:
    """The loss at each step; equally long. Beside it, fewer, the losses on val images."""

    steps: npt.NDArray[np.integer]
    losses: npt.NDArray[np.float64]
    validation_steps: npt.NDArray[np.integer] = field(default_factory=lambda: np.zeros(0, np.int64))
    validation_losses: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    num_validation_images: int | None = None


@dataclass(frozen=True)
class SampleGrid:
    """Samples (h, w, 3), a row a diagnosis, that were drawn after so many steps of the training."""

    step: int
    picture: Pixels


@dataclass(frozen=True)
class NearestPair:
    """A sample (h, w, 3), the training image nearest to it, and their names and pixel correlation."""

    sample: Pixels
    nearest: Pixels
    correlation: float
    sample_label: str
    nearest_label: str
    is_copy: bool = False


@dataclass(frozen=True)
class AttributeAccuracy:
    """How often the descriptor's words about one attribute are right; shares with their 95 % interval."""

    attribute: str
    n: int
    accuracy: float
    low: float
    high: float
    balanced_accuracy: float | None
    """Mean over the true words of the share right; None where only one occurs."""
    majority: float
    """What always saying the commonest word would score."""


@dataclass(frozen=True)
class ReportContent:
    """Everything that a recipe's report shows; a part that is missing is said to be missing."""

    recipe: str
    title: str
    size_px: int
    sources: Sequence[Mapping[str, Any]] = ()
    """name, licence, num_records, num_quarantined, num_lesions, diagnoses (diagnosis -> images) of each."""
    quarantined: Sequence[Mapping[str, Any]] = ()
    """image_id, file, reason (and source) of each row that could not become a record."""
    labels: Sequence[Mapping[str, Any]] = ()
    """source, source_label, diagnosis (None for none), num_images of each label."""
    split_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """split -> diagnosis -> images."""
    left_out_of_training: Mapping[str, int] = field(default_factory=dict)
    """Why images of the train split are not learned from -> images."""
    joined: Mapping[str, int] = field(default_factory=dict)
    """archive_id, digest, other_diagnosis: images left out as doubles, by what they share."""
    hair: HairExamples | None = None
    captions: Sequence[CaptionExample] = ()
    caption_verdicts: Mapping[str, int] = field(default_factory=dict)
    """accepted, fallback -> images; empty where no model was asked."""
    caption_accuracy: Sequence[AttributeAccuracy] = ()
    """Of the descriptor's words, where the images were drawn."""
    reconstructions: Reconstructions | None = None
    comparison: Sequence[ComparisonRow] = ()
    losses: Mapping[str, LossCurve] = field(default_factory=dict)
    """asset (autoencoder, generator) -> its loss curve."""
    grids: Sequence[SampleGrid] = ()
    """Samples on the way, in the order of their steps."""
    grid_rows: Sequence[str] = ()
    """The diagnosis of each of their rows."""
    agreement: Mapping[str, float] = field(default_factory=dict)
    """"all" and diagnosis -> share of samples that classifiers of real images call what was asked for."""
    num_samples: Mapping[str, int] = field(default_factory=dict)
    """"all" and diagnosis -> samples."""
    num_unseen: int | None = None
    """Samples of cells (diagnosis, skin type ...) without a training image; None where it is not known."""
    num_agreement_seeds: int = 1
    """Classifiers over which the agreement is averaged."""
    fidelity: pd.DataFrame | None = None
    """Columns as `fidelity.FidelityRow`."""
    copies: Mapping[str, Any] = field(default_factory=dict)
    """num_copies, num_samples, num_train, num_held_out, copy_rate, held_out_rate, p_value, beyond_chance, reason."""
    nearest_pairs: Sequence[NearestPair] = ()
    overall: pd.DataFrame | None = None
    """This and the next four as in `groups.GroupMetrics`."""
    groups: pd.DataFrame | None = None
    worst: pd.DataFrame | None = None
    gains: pd.DataFrame | None = None
    left_out: pd.DataFrame | None = None
    min_group_size: int = 30
    """Below it a group is drawn hollow and cannot be the worst."""
    confidence: float = 0.95
    """Of every interval."""
    lineage: Mapping[str, Any] | None = None
    """reference, content_digest, inputs (role -> the same) of the artifact that the report rests on."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The recipe."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    """name -> version."""
