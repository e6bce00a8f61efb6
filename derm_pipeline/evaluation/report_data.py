"""The part of a report that shows what went in: sources, labels, splits, hair, captions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from derm_pipeline.evaluation.markup import Child, Markup, element, facts, percent, picture, table
from derm_pipeline.evaluation.report_content import AttributeAccuracy, CaptionExample, HairExamples, ReportContent
from derm_pipeline.evaluation.report_sections import MOST_SHOWN, columns, missing, paragraph, section
from derm_pipeline.records import Diagnosis

_MOST_QUARANTINED = 100
_MOST_LABELS = 60


def data_section(content: ReportContent, side_px: int) -> Markup:
    """Sources, quarantined rows, splits, hair, captions."""
    return section(
        "data",
        "Data",
        paragraph(
            "Every image comes from one of these sources. A file that is broken, or a row that cannot be read, "
            "becomes no "
            "record; it is quarantined with its reason, never dropped silently."
        ),
        _sources(content.sources) if content.sources else missing("Sources"),
        _labels(content.labels),
        _quarantined(content.quarantined),
        element("h3", "Splits"),
        paragraph(
            "All images of a lesion, a patient and their duplicates are in one split. The generator learns from train; "
            "figures of nearness and of classifiers are about test, which neither it nor any classifier has learned "
            "from."
        ),
        _splits(content.split_counts) if content.split_counts else missing("Splits"),
        _not_used(content.left_out_of_training, content.joined),
        _hair(content.hair, side_px) if content.hair else None,
        _captions(content.captions, side_px) if content.captions else None,
        _verdicts(content.caption_verdicts),
        _caption_accuracy(content.caption_accuracy),
    )


def _sources(sources: Sequence[Mapping[str, Any]]) -> Markup:
    names = _diagnoses(source.get("diagnoses", {}) for source in sources)
    headers = ["source", "licence", "images", "lesions", "quarantined", *names]
    keys = ("num_records", "num_lesions", "num_quarantined")
    rows = [
        [
            str(source.get("name", "")),
            element("span", str(source.get("licence") or "not known"), class_="wide"),
            *(source.get(key) for key in keys),
            *(source.get("diagnoses", {}).get(name, 0) for name in names),
        ]
        for source in sources
    ]
    return table(headers, rows)


def _diagnoses(counts: Iterable[Mapping[str, int]]) -> list[str]:
    """Every diagnosis that is counted: the canonical ones in their order, then others."""
    found = {name for one in counts for name in one}
    canonical = [name.value for name in Diagnosis if name.value in found]
    return canonical + sorted(found - set(canonical))


def _quarantined(rows: Sequence[Mapping[str, Any]]) -> Markup:
    if not rows:
        return paragraph("Nothing was quarantined.")
    headers = ["source", "image", "file", "reason"]
    keys = ("source", "image_id", "file", "reason")
    shown = [[str(row.get(key) or "") for key in keys] for row in rows[:_MOST_QUARANTINED]]
    more = len(rows) - len(shown)
    rest = paragraph(f"and {more:,} more, in the records artifact.") if more else None
    return element("details", element("summary", f"{len(rows):,} quarantined rows"), table(headers, shown), rest)


def _splits(counts: Mapping[str, Mapping[str, int]]) -> Markup:
    names = _diagnoses(counts.values())
    rows: list[list[Child]] = [
        [split, sum(own.values()), *(own.get(name, 0) for name in names)] for split, own in counts.items()
    ]
    return table(["split", "images", *names], rows)


def _hair(hair: HairExamples, side_px: int) -> Markup:
    pairs = list(zip(hair.images, hair.overlaid, strict=True))[:MOST_SHOWN]
    return element(
        "div",
        element("h3", "Hair"),
        paragraph(
            f"{percent(hair.hairy_fraction)} of n = {hair.num_images:,} images are hairy. Above the image, below it "
            f"the "
            "same with what was taken for hair in colour."
        ),
        columns(([(image, "image"), (overlaid, "its hair mask")] for image, overlaid in pairs), side_px),
    )


def _captions(examples: Sequence[CaptionExample], side_px: int) -> Markup:
    items = (
        element(
            "div",
            picture(example.image, "captioned image", side_px=side_px),
            facts(
                [
                    ("from the record", example.metadata or "no such caption"),
                    ("from the image", example.visual or "no such caption"),
                ]
            ),
            class_="caption",
        )
        for example in examples[:MOST_SHOWN]
    )
    return element(
        "div",
        element("h3", "Captions"),
        paragraph(
            "What the generator may be told: the record's known fields, or what can be seen. Unknown is never said."
        ),
        element("div", items, class_="captions"),
    )


def _labels(labels: Sequence[Mapping[str, Any]]) -> Markup | None:
    """What each of the sources' own labels means here."""
    if not labels:
        return None
    shown = [
        [row["source"], row["source_label"] or "no label", row["diagnosis"] or "none", f"{row['num_images']:,}"]
        for row in labels[:_MOST_LABELS]
    ]
    more = len(labels) - len(shown)
    return element(
        "details",
        element("summary", f"what the sources' {len(labels):,} labels mean here"),
        table(["source", "its label", "diagnosis", "images"], shown),
        paragraph(f"and {more:,} more, in the records artifact.") if more else None,
    )


def _not_used(left_out: Mapping[str, int], joined: Mapping[str, int]) -> Markup | None:
    """Which images of the train split are not learned from, and why."""
    reasons = [f"{count:,} for {words}" for words, count in left_out.items() if count]
    if not reasons:
        return None
    doubles = ""
    if joined.get("archive_id") or joined.get("digest"):
        doubles = (
            f" Doubles are the same image a second time, mostly from another source: {joined['archive_id']:,} by the "
            f"name that an archive gave, {joined['digest']:,} by the same bytes; {joined['other_diagnosis']:,} of them "
            "carry another diagnosis there."
        )
    return paragraph(f"Of the train split are not used: {'; '.join(reasons)}.{doubles}")


def _verdicts(verdicts: Mapping[str, int]) -> Markup | None:
    total = sum(verdicts.values())
    if not total:
        return None
    parts = ", ".join(f"{count:,} {verdict}" for verdict, count in verdicts.items())
    return paragraph(
        f"A model was asked to describe n = {total:,} images: {parts}. Where no answer passed the gate, the words are "
        "the descriptor's."
    )


def _caption_accuracy(rows: Sequence[AttributeAccuracy]) -> Markup | None:
    """How right the descriptor's words are, where the truth is known because the images were drawn."""
    if not rows:
        return None
    shown = [
        [
            row.attribute,
            f"{row.n:,}",
            f"{percent(row.accuracy)} [{percent(row.low)}, {percent(row.high)}]",
            "" if row.balanced_accuracy is None else percent(row.balanced_accuracy),
            percent(row.majority),
        ]
        for row in rows
    ]
    return element(
        "details",
        element("summary", "how often the words of what was measured are right, on drawn images"),
        table(["words about", "images", "right (95 %)", "balanced", "always the commonest word"], shown),
    )
