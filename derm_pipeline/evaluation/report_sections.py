"""The parts of a report that show what was made and from what: training, samples, lineage, settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from derm_pipeline.evaluation.markup import (
    Child,
    Markup,
    as_yaml,
    element,
    facts,
    number,
    picture,
)
from derm_pipeline.evaluation.plots import Measured, loss_chart
from derm_pipeline.evaluation.report_content import (
    ComparisonRow,
    LossCurve,
    NearestPair,
    Reconstructions,
    ReportContent,
    SampleGrid,
)
from derm_pipeline.images import Pixels
from derm_pipeline.records import Diagnosis

MOST_SHOWN = 14
"""Pictures in one line of examples."""


def section(key: str, title: str, *children: Child) -> Markup:
    """One section with its heading; `key` is what the navigation points at."""
    return element("section", element("h2", title), children, id=key)


def paragraph(*children: Child) -> Markup:
    """Words for people."""
    return element("p", children)


def missing(what: str) -> Markup:
    """Said instead of a part that there is no data for."""
    return element("p", f"{what}: not made in this run.", class_="missing")


def in_words(diagnosis: str) -> Child:
    """A diagnosis as its code, with its phrase under the pointer."""
    if diagnosis in set(Diagnosis):
        return element("abbr", diagnosis, title=Diagnosis(diagnosis).phrase)
    return diagnosis


def columns(columns: Iterable[Sequence[tuple[Pixels, str]]], side_px: int) -> Markup:
    """Pictures in columns of a few each, which wrap on narrow pages."""
    stacks = (
        element("div", (picture(image, alt, side_px=side_px) for image, alt in stack), class_="stack")
        for stack in columns
    )
    return element("div", stacks, class_="pictures")


# --- Training and samples -----------------------------------------------------------------------------------------


def training_section(content: ReportContent, side_px: int) -> Markup:
    """Loss curves and reconstructions."""
    curves = [_curve(name, curve) for name, curve in content.losses.items() if len(curve.steps)]
    return section(
        "training",
        "Training",
        paragraph(
            "The loss of every step: the line is the mean over a fortieth of the steps, the shade behind it the "
            "range of "
            "the single steps. A loss says that training went on, not that the images are good."
        ),
        _validation_words(content.losses),
        element("div", curves, class_="losses") if curves else missing("Loss curves"),
        _grids(content.grids, content.grid_rows, side_px) if content.grids else None,
        _reconstructions(content.reconstructions, side_px) if content.reconstructions else None,
    )


def _curve(name: str, curve: LossCurve) -> Markup:
    finite = np.isfinite(curve.losses)
    if not finite.any():
        return paragraph(f"{name}: no loss is finite.")
    return loss_chart(
        curve.steps[finite],
        curve.losses[finite],
        label=f"{name}: loss, n = {len(curve.steps):,} steps",
        validation=_validation(curve),
    )


def _validation(curve: LossCurve) -> Measured:
    finite = np.isfinite(curve.validation_losses)
    return curve.validation_steps[finite], curve.validation_losses[finite]


def _validation_words(losses: Mapping[str, LossCurve]) -> Markup | None:
    """What the second line of the charts is, and of how many images."""
    measured = {name: curve for name, curve in losses.items() if len(curve.validation_steps)}
    if not measured:
        return None
    counts = dict.fromkeys(curve.num_validation_images for curve in measured.values())
    of = " and ".join(f"n = {number(count)}" for count in counts if count is not None)
    return element(
        "div",
        _key("training", "s-real"),
        _key(f"validation, {of} images" if of else "validation", "s-synthetic"),
        element(
            "small",
            "Validation: images of the split val, with the same noise each time, so look at its course. Nothing is "
            "learned from them and nothing chosen by them. Where it rises while training falls, images are learned by "
            "heart.",
        ),
        class_="legend",
    )


def _key(words: str, series: str) -> Markup:
    return element("span", element("span", class_="line"), words, class_=f"key {series}")


def _grids(found: Sequence[SampleGrid], rows: Sequence[str], side_px: int) -> Markup:
    """Pictures side by side, the diagnoses of their rows at the left."""
    longest_px = round(0.4 * side_px * max(1, len(rows)))
    names = element(
        "figure",
        element("figcaption", "\u00a0"),
        element("div", (element("div", in_words(row)) for row in rows), class_="gridrows"),
        aria_hidden="true",
    )
    pictures = (
        element(
            "figure",
            element("figcaption", f"step {grid.step:,}"),
            picture(grid.picture, f"samples after step {grid.step:,}: {', '.join(rows)}", side_px=longest_px),
        )
        for grid in found
    )
    return element(
        "div",
        element("h3", "Samples on the way"),
        paragraph(
            "What the generator drew while it learned, in few steps of its sampler: a row a diagnosis, the same noise "
            "and the same conditions each time."
        ),
        element("div", names, pictures, class_="grids"),
    )


def _reconstructions(found: Reconstructions, side_px: int) -> Markup:
    quality = ""
    if found.psnr_db is not None:
        count = f"n = {found.num_images:,} held-out images" if found.num_images else "held-out images"
        quality = f" Mean PSNR {found.psnr_db:.1f} dB over {count}; higher is nearer, without an interval."
    pairs = list(zip(found.images, found.rebuilt, strict=True))[:MOST_SHOWN]
    return element(
        "div",
        element("h3", "Reconstructions"),
        paragraph(
            "A real image, and below it what the autoencoder makes of it. Samples pass the same decoder." + quality
        ),
        columns(([(image, "real"), (rebuilt, "reconstruction")] for image, rebuilt in pairs), side_px),
    )


def samples_section(content: ReportContent, side_px: int) -> Markup:
    """Real images and samples side by side, a row a diagnosis."""
    rows = (_comparison(row, side_px) for row in content.comparison)
    return section(
        "samples",
        "Samples beside real images",
        paragraph(
            "One line a diagnosis: real images on the left, samples on the right, light to dark skin. They are "
            "examples, not a figure."
        ),
        _unseen(content),
        element("div", _comparison_head(), rows, class_="comparison") if content.comparison else missing("Samples"),
    )


def _unseen(content: ReportContent) -> Markup | None:
    if content.num_unseen is None:
        return None
    total = content.num_samples.get("all", 0)
    return paragraph(
        f"Samples of cells without a training image: {content.num_unseen:,} of n = {total:,}. There the generator has "
        "seen each condition, but never their combination."
    )


def _comparison_head() -> Markup:
    names = ("", "real", "samples")
    return element("div", (element("div", name) for name in names), class_="compare head", aria_hidden="true")


def _comparison(row: ComparisonRow, side_px: int) -> Markup:
    phrase = Diagnosis(row.diagnosis).phrase if row.diagnosis in set(Diagnosis) else ""
    return element(
        "div",
        element("div", element("b", row.diagnosis), element("small", phrase), class_="label"),
        _strip(row.real, row.real_labels, f"real {row.diagnosis}", side_px),
        _strip(row.samples, row.sample_labels, f"sample of {row.diagnosis}", side_px),
        class_="compare",
    )


def _strip(images: Pixels, labels: Sequence[str], kind: str, side_px: int) -> Markup:
    if not len(images):
        return element("div", element("span", f"no {kind}", class_="missing"), class_="strip")
    cells = (
        element("figure", picture(image, f"{kind}, {label}", side_px=side_px), element("figcaption", label))
        for image, label in list(zip(images, labels, strict=True))[:8]
    )
    return element("div", cells, class_="strip")


# --- Nearest pairs ------------------------------------------------------------------------------------------------


def nearest_pairs(pairs: Sequence[NearestPair], side_px: int) -> Markup:
    """The contact sheet of the samples nearest to a training image, each above it."""
    cells = (
        element(
            "figure",
            picture(pair.sample, f"sample {pair.sample_label}", side_px=side_px),
            picture(pair.nearest, f"training image {pair.nearest_label}", side_px=side_px),
            element(
                "figcaption",
                f"r = {pair.correlation:.2f}",
                element("b", " flagged", class_="bad") if pair.is_copy else None,
                element("br"),
                element("small", pair.sample_label, element("br"), pair.nearest_label),
            ),
        )
        for pair in pairs[:16]
    )
    return element("div", cells, class_="pictures pairs")


# --- Lineage and settings -----------------------------------------------------------------------------------------


def lineage_section(content: ReportContent) -> Markup:
    """The tree of artifacts that the figures rest on, the recipe, the libraries."""
    tree = _tree(content.lineage) if content.lineage else missing("Lineage")
    versions = facts((name, version) for name, version in sorted(content.libraries.items()))
    return section(
        "lineage",
        "Lineage and settings",
        paragraph(
            "Which artifact was made from which, down to the publishers' files. The digest is that of the content: the "
            "same digest is the same bytes. An artifact that several others use is opened once."
        ),
        tree,
        element("h3", "Recipe"),
        element("details", element("summary", "all settings"), as_yaml(content.settings))
        if content.settings
        else missing("Settings"),
        element("h3", "Libraries"),
        versions if content.libraries else missing("Versions"),
    )


def _tree(root: Mapping[str, Any]) -> Markup:
    shown: set[str] = set()

    def grow(role: str | None, node: Mapping[str, Any], depth: int) -> Markup:
        name, digest = str(node.get("reference", "")), str(node.get("content_digest") or "")
        inputs: Mapping[str, Any] = node.get("inputs") or {}
        is_again = bool(inputs) and name in shown
        shown.add(name)
        head = [
            element("span", f"{role}: ", class_="role") if role else None,
            element("code", name),
            element("span", f" {digest[:12]}", class_="digest", title=digest) if digest else None,
            element("span", " (opened above)", class_="digest") if is_again else None,
        ]
        if not inputs or is_again:
            return element("li", head)
        below = element("ul", (grow(role, child, depth + 1) for role, child in inputs.items()))
        return element("li", element("details", element("summary", head), below, open=depth < 2))

    return element("div", element("ul", grow(None, root, 0), class_="tree"), class_="scroll")


def image_count(content: ReportContent) -> tuple[int, int]:
    """Images and lesions of all sources."""
    keys = ("num_records", "num_lesions")
    images, lesions = (sum(int(source.get(key) or 0) for source in content.sources) for key in keys)
    return images, lesions


def totals(content: ReportContent) -> Iterator[str]:
    """What the figures are about, in a few words each."""
    images, lesions = image_count(content)
    yield f"{number(images)} images of {number(lesions)} lesions"
    yield f"{content.size_px} x {content.size_px} px"
    if held_out := sum(content.split_counts.get("test", {}).values()):
        yield f"{number(held_out)} test images"
