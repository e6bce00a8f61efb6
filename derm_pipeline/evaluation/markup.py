"""HTML from data: elements that escape whatever is not markup already, figures in words, images as data URIs, tables.

Nothing here knows what is reported. Text becomes HTML in one place only, `element`, so nothing can be left unescaped.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import cv2
import numpy as np

from derm_pipeline.images import Pixels, encode_jpeg, encode_png

NOTHING = "–"
"""Where there is no figure."""

_VOID = {"br", "img", "meta"}
_PNG_UP_TO_PX = 64
"""Side up to which a picture stays a PNG, whose file is small then and which adds no artefacts of its own."""


class Markup(str):
    """Text that is HTML already; any other text is escaped when it enters an element."""

    __slots__ = ()


Child = str | int | Iterable[Any] | None
"""What may stand in an element: text, a number, markup, nothing, or several of these."""


def element(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """One element. `class_` is the attribute class, `data_x` is data-x; an attribute that is None or False is left out.

    Examples:
        >>> element("p", "1 < 2", class_="note")
        '<p class="note">1 &lt; 2</p>'
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        written = "" if value is True else f'="{html.escape(str(value))}"'
        parts.append(key.rstrip("_").replace("_", "-") + written)
    opening = f"<{' '.join(parts)}>"
    return Markup(opening if name in _VOID else f"{opening}{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Children one after the other, escaped where they are text."""
    return Markup("".join(map(_inner, children)))


def _inner(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str):
        return html.escape(child)
    if isinstance(child, Iterable):
        return join(child)
    return html.escape(str(child))


def page(title: str, body: Iterable[Child], *, script: str = "") -> str:
    """A whole page that loads nothing and runs nothing but `script`, which its content security policy names."""
    from hashlib import sha256

    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    style = resources.files("derm_pipeline.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(style)),
    )
    scripts = Markup(f"<script>{script}</script>") if script else None
    return "<!DOCTYPE html>\n" + element("html", head, element("body", body, scripts), lang="en") + "\n"


# --- Figures in words ---------------------------------------------------------------------------------------------


def is_known(value: Any) -> bool:
    """Whether there is a value: not None, NaN or pandas' NA."""
    if value is None or isinstance(value, str):
        return value is not None
    return bool(value == value)  # only NaN is not itself


def percent(share: Any, digits: int = 1) -> str:
    """A share as per cent."""
    return f"{100 * float(share):.{digits}f}\u00a0%" if is_known(share) else NOTHING


def points(gain: Any) -> str:
    """A difference of shares in percentage points, with its sign."""
    # Adding 0 makes a rounded -0 positive.
    return f"{round(100 * float(gain), 1) + 0.0:+.1f}".replace("-", "\u2212") if is_known(gain) else NOTHING


def number(value: Any) -> str:
    """A figure to three significant digits, a count with thousands; text as it is."""
    if not is_known(value):
        return NOTHING
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            return str(value)
        value = float(value)
        large = abs(value) >= 1000
        return (f"{value:,.0f}" if large else f"{value:.3g}").replace("-", "\u2212")
    return str(value)


def percent_interval(low: Any, high: Any) -> str:
    """An interval of shares, in per cent."""
    return f"[{100 * float(low):.1f}, {100 * float(high):.1f}]" if is_known(low) and is_known(high) else "no interval"


def points_interval(low: Any, high: Any) -> str:
    """An interval of differences, in points."""
    return f"[{points(low)}, {points(high)}]" if is_known(low) and is_known(high) else "no interval"


def interval(low: Any, high: Any) -> str:
    """An interval of any other figure."""
    return f"[{number(low)}, {number(high)}]" if is_known(low) and is_known(high) else "no interval"


# --- Pictures and tables ------------------------------------------------------------------------------------------


def picture(image: Pixels, alt: str, *, side_px: int) -> Markup:
    """An image (h, w, 3) in the page itself, no longer than `side_px` on its long side."""
    scale = side_px / max(image.shape[0], image.shape[1])
    if scale < 1:
        width, height = (max(1, round(image.shape[axis] * scale)) for axis in (1, 0))
        image = np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    if max(image.shape[0], image.shape[1]) <= _PNG_UP_TO_PX:
        kind, content = "png", encode_png(image)
    else:
        kind, content = "jpeg", encode_jpeg(image, quality=88)
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return element("img", src=source, alt=alt, title=alt, width=image.shape[1], height=image.shape[0])


def table(headers: Sequence[str], rows: Iterable[Sequence[Child]], *, class_: str | None = None) -> Markup:
    """A table that scrolls sideways where the page is narrow; numbers stand at the right."""
    cells = [list(row) for row in rows]
    numeric = {column for row in cells for column, value in enumerate(row) if _is_numeric(value)}
    head = (
        element("th", name, scope="col", class_="num" if column in numeric else None)
        for column, name in enumerate(headers)
    )
    body = (element("tr", (_cell(value) for value in row)) for row in cells)
    inner = element("table", element("thead", element("tr", head)), element("tbody", body), class_=class_)
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label="table")


def _cell(value: Any) -> Markup:
    shown = value if isinstance(value, str) else number(value)
    return element("td", shown, class_="num" if _is_numeric(value) else None)


def _is_numeric(value: Any) -> bool:
    if isinstance(value, str):
        return not isinstance(value, Markup) and _looks_numeric(value)
    return isinstance(value, int | float | np.number) and not isinstance(value, bool | np.bool_)


def _looks_numeric(text: str) -> bool:
    return re.fullmatch(r"[-+\u2212\[]?[0-9][0-9.,+\u2212\u00a0 %\]e-]*( points)?", text) is not None


def facts(pairs: Iterable[tuple[str, Child]]) -> Markup:
    """A list of names and values."""
    return element("dl", ((element("dt", name), element("dd", value)) for name, value in pairs), class_="facts")


def as_yaml(value: Mapping[str, Any]) -> Markup:
    """Nested settings as YAML, in the order given."""
    import yaml

    text = yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True, width=100)
    return element("pre", element("code", text))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, bool | int | float | None) else str(value)
