"""A source's own words, read leniently in case and strictly in meaning."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from derm_pipeline.records import Sex, Site
from derm_pipeline.sources.listing import UNKNOWN_WORDS, parse_mapped

SEXES = {sex.value: sex for sex in Sex}


def known_or_none(text: str) -> str | None:
    """The text; None for the spellings of unknown, so that no two rows share "nan" as their lesion."""
    return None if text.lower() in UNKNOWN_WORDS else text


def label_or_blank(text: str, labels: Collection[str]) -> str:
    """The label as it stands; "" for the spellings of unknown, but for one that is among the source's own labels.

    Args:
        text: the cell.
        labels: the source's labels in lower case.
    """
    return text if text.lower() in labels else known_or_none(text) or ""


def known_cells(cells: Mapping[str, str], columns: tuple[str, ...]) -> dict[str, str]:
    """The cells of these columns whose value is known, as they stand; a column may be absent."""
    return {name: cells[name] for name in columns if known_or_none(cells.get(name, "")) is not None}


def parse_site(column: str, cells: Mapping[str, str], sites: Mapping[str, Site]) -> tuple[Site | None, dict[str, str]]:
    """The site of a row, and the concept `site` with the source's own word where that is another one.

    Args:
        column: where the site stands; an absent column is an unknown site.
        cells: the row.
        sites: the source's words in lower case and what each means here.

    Raises:
        BadRowError: a word that is not in `sites`.
    """
    text = cells.get(column, "")
    site = parse_mapped(sites, column, text)
    return site, {"site": text} if site is not None and text != site.value else {}
