"""The part of a report that says whom the synthetic data helps, and whom it fails: groups, the worst of them, gains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from derm_pipeline.evaluation.markup import (
    Markup,
    element,
    number,
    percent,
    percent_interval,
    points,
    points_interval,
    table,
)
from derm_pipeline.evaluation.plots import Mark, Row, dot_plot, legend, share_scale
from derm_pipeline.evaluation.report_content import ReportContent
from derm_pipeline.evaluation.report_figures import (
    arms_of,
    axis_words,
    figures_note,
    group_words,
    lanes,
    mark_of,
    metric_words,
    records_of,
    scale_of_gains,
    verdict,
)
from derm_pipeline.evaluation.report_sections import missing, paragraph, section

_OPEN_AXES = ("diagnosis", "skin_tone", "malignant x skin_tone")


def groups_section(content: ReportContent) -> Markup:
    """Worst groups, their gains, every group of every axis, and who is in no group."""
    groups, worst = content.groups, content.worst
    if groups is None or worst is None or not len(groups):
        return section("groups", "Whom does it help, and whom does it fail?", missing("Groups"))
    rows, arms = records_of(groups), arms_of(groups)
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    return section(
        "groups",
        "Whom does it help, and whom does it fail?",
        paragraph(
            "A group's figure is recall where the group has one diagnosis, sensitivity (or specificity) for "
            "malignancy where "
            "it has malignancy, and otherwise balanced accuracy: the mean recall over the diagnoses in it. A hollow "
            "mark is a "
            f"group that counts for fewer than {content.min_group_size} images of one diagnosis; it is shown, but "
            f"cannot be "
            "the worst."
        ),
        legend(arms),
        element("h3", "The worst group of each axis"),
        _worst(records_of(worst), rows, arms),
        _gains(content),
        element("h3", "Every group"),
        [_axis(axis, [row for row in rows if row["axis"] == axis], arms) for axis in axes],
        _left_out(content),
        element("details", element("summary", "All group figures"), _groups_table(rows)),
    )


def _contests(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["axis"], row["metric"]) for row in rows))


def _contest_name(axis: str, metric: str) -> Markup:
    return element("span", element("b", axis_words(axis)), element("small", metric_words(metric), class_="remark"))


def _worst(rows: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]], arms: Sequence[str]) -> Markup:
    if not rows:
        return paragraph("No group is large enough to be judged by, so none is called the worst.")
    lines = []
    for axis, metric in _contests(rows):
        own = [row for row in rows if (row["axis"], row["metric"]) == (axis, metric)]
        own.sort(key=lambda row: arms.index(row["arm"]))
        of = {row["group"] for row in groups if (row["axis"], row["metric"]) == (axis, metric)}
        name = _contest_name(axis, f"{metric}, {own[0]['num_groups']} of {len(of)} groups")
        lines.append(Row(name, _worst_note(own), [_worst_mark(row) for row in own]))
    return element(
        "div",
        paragraph(
            "The least figure among the groups that are large enough (how many of how many is said); which group "
            "that is may differ between arms. The least of several noisy figures is low even where all groups are "
            "alike: the table gives the minimum to expect then, and the chance of one as low as this."
        ),
        dot_plot(lines, share_scale(lines), label="worst groups"),
        element("details", element("summary", "Worst groups as a table"), _worst_table(rows)),
    )


def _worst_mark(row: dict[str, Any]) -> Mark:
    return mark_of(row | {"value": row["group_min"]})


def _worst_note(rows: Sequence[dict[str, Any]]) -> Markup:
    return lanes(
        (row["arm"], percent(row["group_min"]), f"{group_words(row['group'])}, n = {row['n']:,}") for row in rows
    )


def _worst_table(rows: Sequence[dict[str, Any]]) -> Markup:
    headers = ["arm", "axis", "metric", "worst group", "its figure", "interval", "n", "lesions", "size", "groups"]
    headers += ["best group's", "difference", "ratio", "to expect if alike", "p if alike"]
    return table(
        headers,
        (
            [
                row["arm"],
                axis_words(row["axis"]),
                row["metric"],
                group_words(row["group"]),
                percent(row["group_min"]),
                percent_interval(row["low"], row["high"]),
                row["n"],
                row["n_clusters"],
                row["size_flag"] or "",
                row["num_groups"],
                percent(row["group_max"]),
                f"{points(row['difference'])[1:]} points",
                number(row["ratio"]),
                percent(row["null_minimum"]),
                number(row["null_p_value"]),
            ]
            for row in rows
        ),
    )


def _gains(content: ReportContent) -> Markup:
    heading = element("h3", "Gains over real images alone")
    if content.gains is None or not len(content.gains):
        return element("div", heading, missing("Gains: no arm to compare with"))
    rows = records_of(content.gains)
    arms = arms_of(content.gains)
    shown = [row for row in rows if row["group"] == "worst" or _is_headline(row)]
    lines = list(_gain_rows(shown, arms))
    baseline = rows[0]["baseline"]
    return element(
        "div",
        heading,
        paragraph(
            f"Each arm less {baseline}, on the same test images in every draw of the bootstrap; the worst group is "
            f"looked for "
            "anew in each arm and draw. An interval that holds 0 shows no difference, whatever the point says. "
            "There are many "
            "intervals here: about one in twenty misses by chance alone."
        ),
        legend(arms),
        dot_plot(lines, scale_of_gains(shown), label="gains, points") if lines else None,
        element("details", element("summary", "All gains, group by group"), _gains_table(rows)),
    )


def _is_headline(row: dict[str, Any]) -> bool:
    return bool(row["axis"] == "overall" and row["metric"] == "balanced_accuracy")


def _gain_rows(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> Iterator[Row]:
    for axis, metric in _contests(rows):
        own = [row for row in rows if (row["axis"], row["metric"]) == (axis, metric)]
        own.sort(key=lambda row: arms.index(row["arm"]))
        name = _contest_name("all images" if axis == "overall" else f"worst by {axis_words(axis)}", metric)
        notes = lanes(
            (row["arm"], points(row["gain"]), f"{points_interval(row['low'], row['high'])}, n = {row['n']:,}")
            for row in own
        )
        yield Row(name, notes, [_gain_mark(row) for row in own])


def _gain_mark(row: dict[str, Any]) -> Mark:
    words = f"{row['arm']}: {points(row['gain'])} points {points_interval(row['low'], row['high'])}, n = {row['n']:,}"
    return Mark(row["gain"], row["low"], row["high"], row["arm"], words)


def _gains_table(rows: Sequence[dict[str, Any]]) -> Markup:
    headers = [
        "arm",
        "axis",
        "group",
        "metric",
        "gain, points",
        "interval",
        "reading",
        "figure",
        "real's",
        "n",
        "lesions",
    ]
    return table(
        headers,
        (
            [
                row["arm"],
                axis_words(row["axis"]),
                _gain_group(row),
                row["metric"],
                points(row["gain"]),
                points_interval(row["low"], row["high"]),
                _reading(row),
                percent(row["value"]),
                percent(row["baseline_value"]),
                row["n"],
                row["n_clusters"],
            ]
            for row in rows
        ),
    )


def _gain_group(row: dict[str, Any]) -> str:
    if row["group"] != "worst":
        return group_words(row["group"])
    return f"worst ({group_words(row['baseline_worst_group'])} → {group_words(row['worst_group'])})"


def _reading(row: dict[str, Any]) -> str:
    if row["higher_is_better"] or row["low"] is None:
        return verdict(row["low"], row["high"])
    return verdict(-row["high"], -row["low"])


def _axis(axis: str, rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> Markup:
    lines = []
    for group, metric in sorted(dict.fromkeys((row["group"], row["metric"]) for row in rows), key=_light_to_dark):
        own = [row for row in rows if (row["group"], row["metric"]) == (group, metric)]
        own.sort(key=lambda row: arms.index(row["arm"]))
        size = f"n = {own[0]['n']:,}" + (f", {own[0]['size_flag']}" if own[0]["size_flag"] else "")
        name = element("span", group_words(group), element("small", size, class_="remark"))
        lines.append(Row(name, figures_note(own), [mark_of(row) for row in own]))
    metrics = " and ".join(dict.fromkeys(metric_words(row["metric"]) for row in rows))
    summary = element("summary", element("b", axis_words(axis)), f": {metrics}, {len(lines)} groups")
    plot = dot_plot(lines, share_scale(lines), label=f"{axis}: {metrics}")
    return element("details", summary, plot, open=axis in _OPEN_AXES, class_="axisblock")


def _light_to_dark(contest: tuple[str, str]) -> list[str]:
    """Sorts groups by their parts, and skin tones from light to dark."""
    order = {"light": "0", "medium": "1", "dark": "2"}
    return [order.get(part, part) for part in contest[0].split(" x ")]


def _left_out(content: ReportContent) -> Markup | None:
    if content.left_out is None or not len(content.left_out):
        return None
    rows = records_of(content.left_out)
    return element(
        "details",
        element("summary", "Images that are in no group"),
        paragraph("Where a fact is not known it is not guessed: the image is left out of that axis."),
        table(["axis", "test images", "in no group"], ([axis_words(r["axis"]), r["n"], r["n_left_out"]] for r in rows)),
    )


def _groups_table(rows: Sequence[dict[str, Any]]) -> Markup:
    headers = [
        "arm",
        "axis",
        "group",
        "metric",
        "value",
        "interval",
        "law",
        "n",
        "lesions",
        "counts as",
        "size",
        "seeds",
    ]
    return table(
        headers,
        (
            [
                row["arm"],
                axis_words(row["axis"]),
                group_words(row["group"]),
                row["metric"],
                percent(row["value"]),
                percent_interval(row["low"], row["high"]),
                row["interval"] or "",
                row["n"],
                row["n_clusters"],
                number(float(row["n_effective"])),
                row["size_flag"] or "",
                row["num_seeds"],
            ]
            for row in rows
        ),
    )
