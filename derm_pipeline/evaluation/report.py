"""One page for people about a recipe, and one about all of them: data in, HTML out.

A page holds everything in itself, loads nothing and, but for the leaderboard's sorting, runs nothing. It has no time
and no random part, so the same content gives the same bytes.
"""

from __future__ import annotations

from derm_pipeline.evaluation.leaderboard import render_leaderboard
from derm_pipeline.evaluation.markup import Markup, element, page
from derm_pipeline.evaluation.plots import loss_curve_picture
from derm_pipeline.evaluation.report_content import (
    CaptionExample,
    ComparisonRow,
    HairExamples,
    LossCurve,
    NearestPair,
    Reconstructions,
    ReportContent,
    SampleGrid,
)
from derm_pipeline.evaluation.report_data import data_section
from derm_pipeline.evaluation.report_figures import (
    agreement_section,
    copies_section,
    fidelity_section,
    overall_section,
)
from derm_pipeline.evaluation.report_groups import groups_section
from derm_pipeline.evaluation.report_headline import headline
from derm_pipeline.evaluation.report_sections import (
    lineage_section,
    samples_section,
    totals,
    training_section,
)

__all__ = [
    "CaptionExample",
    "ComparisonRow",
    "HairExamples",
    "LossCurve",
    "NearestPair",
    "Reconstructions",
    "ReportContent",
    "SampleGrid",
    "loss_curve_picture",
    "render_leaderboard",
    "render_report",
]

MAX_BYTES = 6_000_000
"""A page is no larger, so that it can be mailed and opens at once."""

_SIDES_PX = (160, 112, 80, 56)
"""Longest sides of pictures that are tried in turn until the page is small enough."""

_SECTIONS = (
    ("samples", "Samples"),
    ("agreement", "Agreement"),
    ("fidelity", "Fidelity"),
    ("copies", "Copies"),
    ("overall", "Overall"),
    ("groups", "Groups"),
    ("data", "Data"),
    ("training", "Training"),
    ("lineage", "Lineage"),
)


def render_report(content: ReportContent) -> str:
    """The report as one HTML page of at most `MAX_BYTES` as long as pictures are what makes it large."""
    text = ""
    for side_px in _SIDES_PX:
        text = _render(content, side_px)
        if len(text.encode()) <= MAX_BYTES:
            break
    return text


def _render(content: ReportContent, side_px: int) -> str:
    main = element(
        "main",
        element(
            "header",
            element("p", "recipe ", element("b", content.recipe), class_="over"),
            element("h1", content.title),
            element("p", " · ".join(totals(content)), class_="under"),
        ),
        _banner(content),
        headline(content),
        samples_section(content, side_px),
        agreement_section(content),
        fidelity_section(content),
        copies_section(content, side_px),
        overall_section(content),
        groups_section(content),
        data_section(content, side_px),
        training_section(content, side_px),
        lineage_section(content),
        element("footer", "Made by derm_pipeline. Research data, not for diagnosis."),
        id="top",
    )
    return page(f"{content.recipe}: report", [_navigation(content.recipe), main])


def _navigation(recipe: str) -> Markup:
    links = (element("a", name, href=f"#{key}") for key, name in _SECTIONS)
    return element("nav", element("a", element("b", recipe), href="#top"), links, aria_label="sections")


def _banner(content: ReportContent) -> Markup:
    drawn = any(str(source.get("name")) == "phantom" for source in content.sources)
    words = [
        element("b", "Research data, not for diagnosis."),
        " Samples are made by a network and show nobody; neither they nor the classifiers here may be used on "
        "patients.",
    ]
    if drawn:
        words.append(
            " The phantoms of this run are drawn images, not photographs: its figures show that the pipeline works "
            "and say "
            "nothing about real skin."
        )
    return element("p", words, class_="banner", role="note")
