"""All recipes side by side, as one page whose table can be sorted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from derm_pipeline.evaluation.bootstrap import wilson_interval
from derm_pipeline.evaluation.markup import (
    Child,
    Markup,
    element,
    interval,
    is_known,
    number,
    page,
    percent,
    percent_interval,
    points,
    points_interval,
)
from derm_pipeline.evaluation.report_figures import ARMS, axis_words, group_words, verdict

_SORT = """
document.querySelectorAll("th button").forEach(function (button) {
  button.addEventListener("click", function () {
    var head = button.parentNode, table = head.closest("table"), body = table.tBodies[0];
    var column = head.cellIndex, down = head.getAttribute("aria-sort") !== "descending";
    table.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    function key(row) { return row.cells[column].getAttribute("data-key"); }
    Array.from(body.rows).sort(function (a, b) {
      var x = key(a), y = key(b);
      if (x === "" || y === "") { return (x === "") - (y === ""); }
      var order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    }).forEach(function (row) { body.appendChild(row); });
  });
});
"""


def render_leaderboard(rows: Sequence[Mapping[str, Any]]) -> str:
    """A page with a row for each recipe.

    Args:
        rows: recipe, title, sources (names), num_samples, num_test, agreement; fidelity: metric -> value, low, high,
            floor, n, reason; copies: as `ReportContent.copies`; balanced_accuracy: arm -> value, low, high, n; worst:
            arm -> axis, group, value, low, high, n; gain: axis, value, low, high, n of real+synthetic's worst group.
            Whatever is missing or None is shown as having no figure.
    """
    metrics = sorted({name for row in rows for name in row.get("fidelity") or {}}, key=_metric_order)
    arms = _arms(rows)
    headers = ["recipe", "sources", "samples", "agreement", *metrics, "copies"]
    headers += [f"balanced accuracy: {arm}" for arm in arms] + [f"worst group: {arm}" for arm in arms]
    headers += ["worst group's gain, points", "test images"]
    head = element("tr", (element("th", element("button", name, type="button"), scope="col") for name in headers))
    body = (element("tr", _cells(row, metrics, arms)) for row in rows)
    table = element("table", element("thead", head), element("tbody", body), class_="board")
    main = element(
        "main",
        element("header", element("h1", "Leaderboard"), element("p", f"{len(rows)} recipes", class_="under")),
        element(
            "p",
            element("b", "Research data, not for diagnosis."),
            " Recipes of different sources are judged on different test images: compare within a source. Every "
            "figure is "
            "followed by its interval and n. Distances are beside their floor: real images against each other.",
            class_="banner",
        ),
        element("p", "Press a column's name to sort by it."),
        element("div", table, class_="scroll", tabindex="0", role="region", aria_label="leaderboard")
        if rows
        else element("p", "No recipe has a report yet.", class_="missing"),
        class_="broad",
    )
    return page("Leaderboard", [main], script=_SORT)


def _metric_order(name: str) -> tuple[bool, bool, str]:
    return not name.startswith(("fd", "fid")), not name.startswith("kid"), name


def _arms(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {arm for row in rows for key in ("balanced_accuracy", "worst") for arm in row.get(key) or {}}
    return [arm for arm in ARMS if arm in found] + sorted(found - set(ARMS))


def _cells(row: Mapping[str, Any], metrics: Sequence[str], arms: Sequence[str]) -> list[Markup]:
    name, title = str(row.get("recipe", "")), str(row.get("title") or "")
    sources = ", ".join(map(str, row.get("sources") or ()))
    cells = [
        _cell(name, element("b", name), title),
        _cell(sources, sources),
        _cell(row.get("num_samples"), number(row.get("num_samples"))),
        _agreement(row.get("agreement"), row.get("num_samples")),
    ]
    cells += [_fidelity((row.get("fidelity") or {}).get(metric)) for metric in metrics]
    cells.append(_copies(row.get("copies") or {}))
    cells += [_share((row.get("balanced_accuracy") or {}).get(arm)) for arm in arms]
    cells += [_share((row.get("worst") or {}).get(arm)) for arm in arms]
    cells += [_gain(row.get("gain")), _cell(row.get("num_test"), number(row.get("num_test")))]
    return cells


def _cell(key: Any, *lines: Child) -> Markup:
    first, *more = lines
    small = (element("small", line) for line in more if line)
    return element("td", element("div", first), small, data_key=str(key) if is_known(key) else "")


def _agreement(share: float | None, n: int | None) -> Markup:
    if share is None or not n:
        return _cell(share, percent(share))
    return _cell(share, percent(share), f"{percent_interval(*wilson_interval(share, n, 0.95))}, {_n(n)}")


def _n(count: Any) -> str:
    return f"n = {number(count)}" if is_known(count) else ""


def _fidelity(figure: Mapping[str, Any] | None) -> Markup:
    if figure is None:
        return _cell(None, number(None))
    if not is_known(figure.get("value")):
        return _cell(None, "no figure", str(figure.get("reason") or ""))
    return _cell(
        figure["value"],
        number(figure["value"]),
        f"{interval(figure.get('low'), figure.get('high'))}, {_n(figure.get('n'))}",
        f"floor {number(figure.get('floor'))}",
    )


def _copies(copies: Mapping[str, Any]) -> Markup:
    if not is_known(copies.get("num_copies")):
        return _cell(None, "no verdict", str(copies.get("reason") or ""))
    words = f"{number(copies['num_copies'])} of {number(copies.get('num_samples'))}"
    beyond = element("b", "beyond chance", class_="bad") if copies.get("beyond_chance") else None
    return _cell(copies.get("copy_rate"), words, f"by chance {percent(copies.get('held_out_rate'), 2)}", beyond)


def _share(figure: Mapping[str, Any] | None) -> Markup:
    if figure is None or not is_known(figure.get("value")):
        return _cell(None, number(None))
    where = f"{group_words(str(figure['group']))} ({axis_words(str(figure['axis']))})" if "group" in figure else ""
    words = f"{percent_interval(figure.get('low'), figure.get('high'))}, {_n(figure.get('n'))}"
    return _cell(figure["value"], percent(figure["value"]), words, where)


def _gain(gain: Mapping[str, Any] | None) -> Markup:
    if gain is None or not is_known(gain.get("value")):
        return _cell(None, number(None))
    low, high = gain.get("low"), gain.get("high")
    words = f"{points_interval(low, high)}, {_n(gain.get('n'))}"
    axis = f" by {axis_words(str(gain['axis']))}" if gain.get("axis") else ""
    return _cell(gain["value"], points(gain["value"]), words, verdict(low, high) + axis)
