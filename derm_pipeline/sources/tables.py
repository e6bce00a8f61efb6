"""Tables of text, read row by row and within bounds: what cannot be read is an error, or a row that says why."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}

MAX_TABLE_BYTES = 2 * 1024**3
MAX_ROWS = 5_000_000
MAX_ROW_CHARS = 100_000
"""Of one row, and so of one cell; below the limit of the csv module, which holds for the whole process."""
MAX_BAD_PART = 0.1
"""Part of the rows that may hold something else than text, before the file is taken for another kind of file ..."""
FEW_BAD_ROWS = 2
"""... though so few may in any table, however small."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
_UNNAMED = re.compile(r"(Unnamed: [0-9]+)?")
"""The name of an index column, as pandas writes it and as it reads and then writes it again."""


@dataclass(frozen=True, slots=True)
class Row:
    """One data row of a table as text, stripped of surrounding blanks."""

    line: int
    """Number of the row's last line in the file, from 1, as an editor shows it."""
    cells: Mapping[str, str]
    problem: str | None = None
    """Why the row cannot be read: too few or too many cells, or bytes that are no text (each shown as U+FFFD)."""


def read_table(path: Path, needed: Collection[str]) -> list[Row]:
    """Read a table with a header, separated by commas, semicolons or tabs, strictly as text.

    UTF-8, with or without a byte order mark; any line ends. The header decides what separates: where it holds several
    of the three, the one that yields the needed columns. Columns without a name (an index, as pandas writes it) are
    kept out of the cells. A row with the wrong number of cells or with bytes that are not UTF-8 has a `problem`.

    Args:
        path: the table.
        needed: columns that must be there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such table: a column of `needed` is missing, one is there twice, the separator is not
            clear, a quote is left open, more than a tenth of the rows (and more than two) are not text, or it is
            larger than `MAX_TABLE_BYTES`, `MAX_ROWS` or, in one row, `MAX_ROW_CHARS`.
    """
    check_table_file(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _Lines(path, file)
        first = next(lines, "")
        if _NOT_TEXT.search(first):
            raise ValueError(f"{path} is not a text table: its header is not UTF-8; save it as text in UTF-8")
        separator = _separator(path, first, needed)
        # strict: an open quote swallows no rows
        reader = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True)
        try:
            columns = [name.strip() for name in next(reader, [])]
            check_columns(path, columns, needed)
            names = [None if _UNNAMED.fullmatch(name) and name not in needed else name for name in columns]
            rows = list(_rows(reader, lines, names))
        except csv.Error as error:
            why = str(error).replace("unexpected end of data", "the table ends within a cell; is a quote left open?")
            raise ValueError(f"{path}, line {reader.line_num}: {why}") from error
    check_bad_rows(path, lines.num_bad_rows, len(rows))
    return rows


def check_table_file(path: Path) -> None:
    """Look at a table's kind and size before it is read; raises as `read_table` does."""
    if not path.exists():
        raise FileNotFoundError(f"there is no table {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_TABLE_BYTES:,} are read")


def check_columns(path: Path, columns: Sequence[str], needed: Collection[str]) -> None:
    """Raises ValueError where a column of `needed` is missing, or one with a name is there twice."""
    missing = [name for name in needed if name not in columns]
    if missing:
        found = ", ".join(filter(None, columns))[:500] or "none"
        raise ValueError(f"{path} has no column {', '.join(map(repr, missing))}; columns found: {found}")
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has the column {', '.join(map(repr, twice))} more than once; keep one")


def check_bad_rows(path: Path, num_bad: int, num_rows: int) -> None:
    """Raises ValueError where so many rows are not text that the file is something else than a table."""
    if num_bad > FEW_BAD_ROWS and num_bad > MAX_BAD_PART * num_rows:
        raise ValueError(f"{path} is not a text table: {num_bad:,} of {num_rows:,} rows are not UTF-8; save it as such")


class _Lines:
    """The lines of a table, up to `MAX_ROW_CHARS` for one row; it notes whether the row holds text only."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path = path
        self._file = file
        self.line = 0  # handed out
        self._row_chars = 0
        self._is_text = True
        self.num_bad_rows = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        text = self._file.readline(MAX_ROW_CHARS + 1)
        if not text:
            raise StopIteration
        self.line += 1
        self._row_chars += len(text)
        if self._row_chars > MAX_ROW_CHARS:
            raise ValueError(
                f"{self._path}, line {self.line}: the row has more than {MAX_ROW_CHARS:,} characters; "
                "is a quote left open?"
            )
        self._is_text = self._is_text and not _NOT_TEXT.search(text)
        return text

    def end_row(self) -> bool:
        """Begin another row; whether the one that ends is text."""
        was_text = self._is_text
        self.num_bad_rows += not was_text
        self._row_chars, self._is_text = 0, True
        return was_text

    def refuse_more_than(self, num_rows: int) -> None:
        if num_rows > MAX_ROWS:
            raise ValueError(f"{self._path} has more than {MAX_ROWS:,} rows; no more are read")


def _separator(path: Path, header: str, needed: Collection[str]) -> str:
    found = {sign: _names(header, sign) for sign in SEPARATORS}
    several = [sign for sign in found if len(found[sign]) > 1]
    if len(several) < 2:
        return several[0] if several else ","
    fitting = [sign for sign in several if all(name in found[sign] for name in needed)]
    if len(fitting) != 1:
        signs = " and ".join(SEPARATORS[sign] for sign in several)
        columns = ", ".join(map(repr, needed)) or "unknown here"
        raise ValueError(
            f"{path}: its header holds {signs}, and it is not clear which of them separate the columns (needed: "
            f"{columns}); put names that hold one of them into quotes"
        )
    return fitting[0]


def _names(header: str, separator: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
    except csv.Error:  # a line break within
        return [name.strip() for name in header.split(separator)]


def _rows(reader: Iterator[list[str]], lines: _Lines, names: Sequence[str | None]) -> Iterator[Row]:
    lines.end_row()  # the header
    shared: dict[str, str] = {}
    num_rows = 0
    for cells in reader:
        is_text = lines.end_row()
        if not cells:
            continue
        num_rows += 1
        lines.refuse_more_than(num_rows)
        problem = None
        if len(cells) != len(names):
            problem = f"the row has {len(cells)} cells; the table has {len(names)} columns"
        if not is_text:
            cells = [as_text(cell) for cell in cells]
            problem = "the row holds bytes that are not UTF-8 text"
        kept = {name: _once(cell.strip(), shared) for name, cell in zip(names, cells, strict=False) if name is not None}
        yield Row(lines.line, kept, problem)


def _once(text: str, shared: dict[str, str]) -> str:
    """The same text, kept only once while there are few: most columns hold few words, and rows are many."""
    if len(shared) < 10_000:
        return shared.setdefault(text, text)
    return shared.get(text, text)


def as_text(text: str) -> str:
    """Text with what is not UTF-8 (bytes that were read as surrogates) shown as U+FFFD, fit for tables and people."""
    return _SURROGATE.sub("\ufffd", text)
