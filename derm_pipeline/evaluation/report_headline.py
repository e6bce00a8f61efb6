"""The handful of figures at the top of a report, each with its n, its interval and what it is to be held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from derm_pipeline.evaluation.bootstrap import wilson_interval
from derm_pipeline.evaluation.markup import (
    Child,
    Markup,
    element,
    interval,
    number,
    percent,
    percent_interval,
    points,
    points_interval,
)
from derm_pipeline.evaluation.report_content import ReportContent
from derm_pipeline.evaluation.report_figures import (
    BASELINE,
    BOTH,
    axis_words,
    group_words,
    metric_words,
    records_of,
    verdict,
)
from derm_pipeline.evaluation.report_sections import image_count

if TYPE_CHECKING:
    import pandas as pd

HEADLINE_AXES = ("skin_tone", "diagnosis x skin_tone", "diagnosis")
"""The axis whose worst group stands for a recipe: the first of these that its sources know enough of."""


def headline(content: ReportContent) -> Markup:
    """The handful of figures that one looks at first."""
    cards = [_images_card(content), _agreement_card(content), _copies_card(content.copies)]
    cards += [_fidelity_card(content.fidelity, kind) for kind in ("fd", "kid")]
    cards += [_worst_card(content), _gain_card(content)]
    return element("div", [card for card in cards if card], class_="cards")


def _card(question: str, figure: Child, *details: Child, tone: str = "") -> Markup:
    return element(
        "div",
        element("h3", question),
        element("div", figure, class_="figure"),
        (element("p", detail) for detail in details if detail),
        class_=f"card {tone}".strip(),
    )


def _images_card(content: ReportContent) -> Markup:
    images, lesions = image_count(content)
    quarantined = sum(int(source.get("num_quarantined") or 0) for source in content.sources)
    test = sum(content.split_counts.get("test", {}).values())
    samples = content.num_samples.get("all")
    return _card(
        "Images",
        number(images),
        f"real, of {number(lesions)} lesions; {number(test)} of them test; {number(quarantined)} quarantined",
        f"{number(samples)} samples" if samples else "",
    )


def _agreement_card(content: ReportContent) -> Markup | None:
    if "all" not in content.agreement:
        return None
    value, n = content.agreement["all"], content.num_samples.get("all", 0)
    low_high = percent_interval(*wilson_interval(value, n, content.confidence)) if n else "no interval"
    return _card(
        "Do samples show what was asked for?",
        percent(value),
        f"{low_high}, n = {number(n)} samples",
        "called the diagnosis that was asked for by a classifier of real images",
    )


def _copies_card(copies: Mapping[str, Any]) -> Markup | None:
    if not copies:
        return None
    if copies.get("num_copies") is None:
        return _card("Are samples copies?", "no verdict", str(copies.get("reason") or ""))
    beyond = copies.get("beyond_chance")
    return _card(
        "Are samples copies?",
        "beyond chance" if beyond else "none beyond chance",
        f"{number(copies['num_copies'])} of {number(copies['num_samples'])} are flagged as near to a training image "
        f"({percent(copies.get('copy_rate'), 2)}), and {percent(copies.get('held_out_rate'), 2)} of "
        f"{number(copies.get('num_held_out'))} unseen real images",
        "more than chance explains: look at the pairs" if beyond else "no more than chance explains",
        tone="bad" if beyond else "",
    )


def _fidelity_card(frame: pd.DataFrame | None, kind: str) -> Markup | None:
    if frame is None:
        return None
    rows = [row for row in records_of(frame) if row["group"] == "all" and _kind(row["metric"]) == kind]
    if not rows:
        return None
    row = rows[0]
    question = f"How near to real? {row['metric']}"
    if row["value"] is None:
        return _card(question, "no figure", row["reason"])
    return _card(
        question,
        number(row["value"]),
        f"{interval(row['low'], row['high'])}, n = {number(row['n'])} a side",
        f"real against real: {number(row['floor'])} {interval(row['floor_low'], row['floor_high'])}",
    )


def _kind(metric: str) -> str:
    kind = metric.split("_")[0]
    return "fd" if kind == "fid" else kind


def _headline_worst(content: ReportContent) -> list[dict[str, Any]]:
    """The worst group of each arm, on the axis that says most of whom is failed."""
    if content.worst is None or not len(content.worst):
        return []
    rows = records_of(content.worst)
    for axis in (*HEADLINE_AXES, rows[0]["axis"]):
        if chosen := [row for row in rows if row["axis"] == axis]:
            return [row for row in chosen if row["metric"] == chosen[0]["metric"]]
    return []


def _worst_card(content: ReportContent) -> Markup | None:
    rows = {row["arm"]: row for row in _headline_worst(content)}
    chosen = [rows[arm] for arm in (BASELINE, BOTH) if arm in rows]
    if not chosen:
        return None
    return _card(
        f"Worst group by {axis_words(chosen[0]['axis'])}",
        " → ".join(percent(row["group_min"]) for row in chosen),
        *(
            f"{row['arm']}: {group_words(row['group'])}, {percent_interval(row['low'], row['high'])}, n = {row['n']:,}"
            for row in chosen
        ),
        metric_words(chosen[0]["metric"]),
        _too_few(content, chosen[0]["axis"], chosen[0]["metric"]),
        tone="double",
    )


def _too_few(content: ReportContent, axis: str, metric: str) -> str:
    """Who is not judged at all: that a group is too small to be the worst must not hide it."""
    rows = [] if content.groups is None else records_of(content.groups)
    own = [row for row in rows if (row["axis"], row["metric"]) == (axis, metric) and not row["eligible"]]
    left = dict.fromkeys(f"{group_words(row['group'])} (n = {row['n']:,})" for row in own)
    if not left:
        return ""
    shown = list(left)[:3] + ([f"{len(left) - 3} more"] if len(left) > 3 else [])
    return f"not judged, too few images: {', '.join(shown)}"


def _gain_card(content: ReportContent) -> Markup | None:
    rows = _headline_worst(content)
    if not rows or content.gains is None:
        return None
    of = (rows[0]["axis"], rows[0]["metric"], "worst", BOTH)
    found = [row for row in records_of(content.gains) if (row["axis"], row["metric"], row["group"], row["arm"]) == of]
    if not found:
        return None
    gain = found[0]
    said = verdict(gain["low"], gain["high"])
    return _card(
        "Does synthetic data help it?",
        element("span", points(gain["gain"]), element("small", " points")),
        f"{points_interval(gain['low'], gain['high'])}, n = {number(gain['n'])}, paired",
        f"{said}: worst group, {BOTH} over {BASELINE}",
        tone={"better": "good", "worse": "bad"}.get(said, ""),
    )
