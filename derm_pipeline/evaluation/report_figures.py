"""The parts of a report that ask whether the samples are right, near to real, and new, and whether they help."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from derm_pipeline.evaluation.bootstrap import wilson_interval
from derm_pipeline.evaluation.markup import (
    Child,
    Markup,
    element,
    interval,
    is_known,
    number,
    percent,
    percent_interval,
    table,
)
from derm_pipeline.evaluation.plots import (
    SERIES,
    Mark,
    Row,
    Scale,
    dot_plot,
    from_zero_scale,
    gain_scale,
    legend,
    share_scale,
)
from derm_pipeline.evaluation.report_content import ReportContent
from derm_pipeline.evaluation.report_sections import in_words, missing, nearest_pairs, paragraph, section

if TYPE_CHECKING:
    import pandas as pd

BASELINE, BOTH = "real", "real+synthetic"
"""The arm that gains are over, and the one that the headline is about."""
ARMS = ("real", "synthetic", "real+synthetic", "oversampling")
"""The order in which arms are shown; others follow."""

_METRICS = {
    "fd": "Fréchet distance: how far the two clouds of features are apart. Lower is nearer.",
    "fid": "Fréchet inception distance: how far the two clouds of features are apart. Lower is nearer.",
    "kid": "Kernel distance: the same question, less biased at small n. Lower is nearer; below 0 is usual for the "
    "floor, as both sides hold the same mix of diagnoses: read it beside the floor.",
    "precision": "Share of samples that lie among the real images. Higher is better, up to the floor's.",
    "recall": "Share of real images that lie among the samples: is everything covered? Higher is better.",
    "density": "As precision, but by how many real images are around a sample. Higher is better, 1 is usual.",
    "coverage": "Share of real images with a sample nearby. Higher is better.",
}
_LOWER_IS_BETTER = ("expected_calibration_error", "brier_score")
_AXES = {"skin_tone": "skin tone", "age_band": "age", "malignant": "malignancy"}


def arms_of(frame: pd.DataFrame) -> list[str]:
    """The arms of a table, in the order in which they are shown."""
    present = [str(arm) for arm in frame.arm.unique()]
    return [arm for arm in ARMS if arm in present] + sorted(set(present) - set(ARMS))


def axis_words(axis: str) -> str:
    """An axis as people say it."""
    return " × ".join(_AXES.get(column, column) for column in axis.split(" x "))


def group_words(group: str) -> str:
    """A group as people say it."""
    return group.replace(" x ", " × ")


def records_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain dicts, NaN as None."""
    rows = frame.to_dict("records")
    return [{str(key): value if is_known(value) else None for key, value in row.items()} for row in rows]


def verdict(low: Any, high: Any) -> str:
    """What an interval of a gain says."""
    if not is_known(low) or not is_known(high):
        return "no interval"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "no difference shown"


def metric_words(metric: str) -> str:
    """A metric as people say it."""
    words = re.sub(r"_at_([0-9.]+)_specificity$", "_at_\\1\u00a0%_specificity", metric).replace("_", " ")
    return words.replace(" auroc", " AUROC").replace(" roc ", " ROC ").replace("brier", "Brier")


# --- Agreement ----------------------------------------------------------------------------------------------------


def agreement_section(content: ReportContent) -> Markup:
    """How often classifiers of real images find in a sample what was asked for, overall and by diagnosis."""
    rows = list(_agreement_rows(content))
    num_diagnoses = max(1, len(content.agreement.keys() - {"all"}))
    seeds = content.num_agreement_seeds
    return section(
        "agreement",
        "Do samples show what was asked for?",
        paragraph(
            "Classifiers that learned from real images only look at every sample and name a diagnosis. This is how "
            "often "
            f"it is the one that was asked for: the mean of {seeds} classifier{'s' if seeds > 1 else ''}, with "
            f"{percent(content.confidence, 0)} intervals (Wilson) over samples. By guessing: "
            f"{percent(1 / num_diagnoses)}. "
            "Very high agreement can also mean that samples are caricatures; read it beside recall and coverage."
        ),
        dot_plot(rows, share_scale(rows), label="agreement") if rows else missing("Agreement"),
    )


def _agreement_rows(content: ReportContent) -> Iterator[Row]:
    for group, value in content.agreement.items():
        n = content.num_samples.get(group, 0)
        low, high = wilson_interval(value, n, content.confidence) if n else (None, None)
        words = f"{percent(value)} {percent_interval(low, high)}, n = {number(n)}"
        name = element("b", "all diagnoses") if group == "all" else in_words(group)
        yield Row(name, words, [Mark(value, low, high, BOTH, f"{group}: {words}")])


# --- Fidelity and copies ------------------------------------------------------------------------------------------


def fidelity_section(content: ReportContent) -> Markup:
    """Each metric for all images and each diagnosis, beside the real-against-real floor."""
    frame = content.fidelity
    if frame is None or not len(frame):
        return section("fidelity", "How near to real?", missing("Fidelity"))
    rows = records_of(frame)
    extractor, repeats = rows[0]["extractor"], rows[0]["repeats"]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    return section(
        "fidelity",
        "How near to real?",
        paragraph(
            "Samples against held-out real images, in the features of the extractor ",
            element("b", extractor),
            ". The grey band is the floor: held-out real images against each other, at the same n and mix of "
            "diagnoses. On "
            "the band, samples cannot be told from real ones by this metric. The bars are the central range over "
            f"{number(repeats)} random halvings; they do not say what other real images would give.",
        ),
        None
        if extractor == "inception"
        else paragraph(
            "No metric here is called FID: that name is for Inception-v3 features. Do not compare with published FIDs."
        ),
        element("div", (_fidelity_plot(m, [r for r in rows if r["metric"] == m]) for m in metrics), class_="two"),
        _details("All figures", _fidelity_table(rows)),
    )


def _fidelity_plot(metric: str, rows: Sequence[dict[str, Any]]) -> Markup:
    shown = [row for row in rows if row["value"] is not None]
    refused = [row for row in rows if row["value"] is None]
    reach = [row[key] for row in shown for key in ("value", "low", "high", "floor_low", "floor_high")]
    scale = from_zero_scale(reach)
    return element(
        "div",
        element("h3", metric),
        paragraph(_METRICS.get(metric.split("_")[0], "")),
        dot_plot([_fidelity_row(row) for row in shown], scale, label=metric) if shown else None,
        _refused(refused) if refused else None,
        class_="block",
    )


def _refused(rows: Sequence[dict[str, Any]]) -> Markup:
    items = (element("li", element("b", row["group"]), f": {row['reason']}") for row in rows)
    return element("div", "No figure for", element("ul", items), class_="refused")


def _fidelity_row(row: dict[str, Any]) -> Row:
    words = (
        f"{number(row['value'])} {interval(row['low'], row['high'])}, floor {number(row['floor'])}, n = {row['n']:,}"
    )
    name = element("b", "all") if row["group"] == "all" else in_words(row["group"])
    remark = element("small", row["reason"], class_="remark") if row["reason"] else None
    mark = Mark(row["value"], row["low"], row["high"], "synthetic", f"{row['group']}: {words}")
    return Row(name, [words, remark], [mark], (row["floor_low"], row["floor"], row["floor_high"]))


def _fidelity_table(rows: Sequence[dict[str, Any]]) -> Markup:
    headers = ["metric", "group", "value", "range", "floor", "floor's range", "ratio", "n a side", "samples"]
    headers += ["real images", "repeats", "remark"]
    cells = (
        [
            row["metric"],
            row["group"],
            number(row["value"]),
            interval(row["low"], row["high"]),
            number(row["floor"]),
            interval(row["floor_low"], row["floor_high"]),
            number(row["ratio"]),
            *(row[key] for key in ("n", "n_synthetic", "n_reference", "repeats")),
            element("span", row["reason"], class_="wide"),
        ]
        for row in rows
    )
    return table(headers, cells)


def copies_section(content: ReportContent, side_px: int) -> Markup:
    """The verdict on copies, and the pairs that came nearest."""
    copies = content.copies
    return section(
        "copies",
        "Are samples copies?",
        paragraph(
            "A sample counts as a copy when it is nearer to a training image, by pixels or by features, than all "
            "but about "
            "one in a hundred unseen real images are. So some are counted by chance, and the question is whether "
            "there are "
            "more than among real images that the generator never saw."
        ),
        _copy_verdict(copies) if copies else missing("Copies"),
        [
            element("h3", "The nearest pairs"),
            paragraph(
                "Above the sample, below it the training image nearest by pixels, possibly turned or mirrored; r is "
                "their "
                "correlation. If the generator copies, it shows here first."
            ),
            nearest_pairs(content.nearest_pairs, side_px),
        ]
        if content.nearest_pairs
        else None,
    )


def _copy_verdict(copies: Mapping[str, Any]) -> Markup:
    if copies.get("num_copies") is None:
        return element("p", f"No verdict: {copies.get('reason')}.", class_="missing")
    sentence = "more than chance explains" if copies.get("beyond_chance") else "no more than chance explains"
    return element(
        "p",
        element("b", f"{number(copies['num_copies'])} of n = {number(copies['num_samples'])} samples"),
        f" ({percent(copies.get('copy_rate'), 2)}) against {number(copies.get('num_train'))} training images, beside "
        f"{percent(copies.get('held_out_rate'), 2)} of n = {number(copies.get('num_held_out'))} held-out real images; "
        f"p = {number(copies.get('p_value'))} (Fisher's exact test, one-sided): ",
        element("b", sentence, class_="bad" if copies.get("beyond_chance") else "good"),
        ".",
    )


# --- Overall ------------------------------------------------------------------------------------------------------


def overall_section(content: ReportContent) -> Markup:
    """Balanced accuracy and the other overall figures of each arm."""
    frame = content.overall
    if frame is None or not len(frame):
        return section("overall", "Does it help overall?", missing("Classifiers"))
    rows, arms = records_of(frame), arms_of(frame)
    metrics = list(dict.fromkeys(row["metric"] for row in rows if row["metric"] not in _LOWER_IS_BETTER))
    shares = [_overall_row(metric, rows, arms) for metric in metrics]
    return section(
        "overall",
        "Does it help overall?",
        paragraph(
            "The same network, steps and seeds are trained on real images, on samples, on both, and on real images "
            "with "
            f"every diagnosis drawn equally often. All are judged on the same n = {number(rows[0]['n'])} real test "
            f"images "
            f"of {number(rows[0]['n_clusters'])} lesions; figures are means over {number(rows[0]['num_seeds'])} seeds, "
            f"with {percent(content.confidence, 0)} bootstrap intervals by lesion."
        ),
        legend(arms),
        dot_plot(shares, share_scale(shares), label="overall figures"),
        _probabilities([row for row in rows if row["metric"] in _LOWER_IS_BETTER], arms),
        _details("All figures", _overall_table(rows)),
    )


def _overall_row(metric: str, rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> Row:
    own = sorted((row for row in rows if row["metric"] == metric), key=lambda row: arms.index(row["arm"]))
    return Row(metric_words(metric), figures_note(own), [mark_of(row) for row in own])


def _probabilities(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> Markup | None:
    """Errors of the predicted probabilities, which are no shares."""
    if not rows:
        return None
    lines = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        own = sorted((row for row in rows if row["metric"] == metric), key=lambda row: arms.index(row["arm"]))
        words = [interval(row["low"], row["high"]) for row in own]
        marks = [
            Mark(row["value"], row["low"], row["high"], row["arm"], f"{row['arm']}: {number(row['value'])} {word}")
            for row, word in zip(own, words, strict=True)
        ]
        written = ((row["arm"], number(row["value"]), word) for row, word in zip(own, words, strict=True))
        lines.append(Row(metric_words(metric), lanes(written), marks))
    scale = from_zero_scale([row[key] for row in rows for key in ("value", "high")])
    return element(
        "div",
        element("h3", "Can its probabilities be believed?"),
        paragraph("Errors of the predicted probabilities; lower is better, 0 is perfect."),
        dot_plot(lines, scale, label="errors of probabilities"),
    )


def mark_of(row: dict[str, Any]) -> Mark:
    """An arm's figure as a mark; hollow where the group is too small to be judged by."""
    words = f"{row['arm']}: {percent(row['value'])} {percent_interval(row['low'], row['high'])}, n = {number(row['n'])}"
    return Mark(row["value"], row["low"], row["high"], row["arm"], words, not row.get("eligible", True))


def figures_note(rows: Sequence[dict[str, Any]]) -> Markup:
    """The same in writing, an arm a line, level with its mark."""
    return lanes((row["arm"], percent(row["value"]), percent_interval(row["low"], row["high"])) for row in rows)


def lanes(lines: Iterable[tuple[str, str, str]]) -> Markup:
    """Figures in writing: arm, figure, what belongs to it; a line a mark."""
    written = (
        element("div", figure, " ", element("small", more), class_=f"s-{SERIES.get(arm, 'other')}", title=arm)
        for arm, figure, more in lines
    )
    return element("div", written, class_="lanes")


def _overall_table(rows: Sequence[dict[str, Any]]) -> Markup:
    headers = ["arm", "metric", "value", "interval", "law", "n", "lesions", "seeds", "diagnoses"]
    return table(
        headers,
        (
            [
                row["arm"],
                row["metric"],
                number(row["value"]),
                interval(row["low"], row["high"]),
                row["interval"] or "",
                *(row[key] for key in ("n", "n_clusters", "num_seeds")),
                row["classes"],
            ]
            for row in rows
        ),
    )


def _details(summary: str, *inside: Child) -> Markup:
    return element("details", element("summary", summary), inside)


def scale_of_gains(rows: Sequence[dict[str, Any]]) -> Scale:
    """One scale for all gains that stand together."""
    return gain_scale([row[key] for row in rows for key in ("gain", "low", "high")])
