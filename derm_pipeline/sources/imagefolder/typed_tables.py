"""Tables with typed values (JSON Lines, parquet), read within bounds as rows of text, as `tables` reads the others."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from derm_pipeline.sources.tables import (
    MAX_ROW_CHARS,
    MAX_ROWS,
    MAX_TABLE_BYTES,
    Row,
    as_text,
    check_bad_rows,
    check_columns,
    check_table_file,
)

_BATCH = 1000
_PANDAS_INDEX = "__index_level_"


def value_as_text(value: Any) -> str:
    """A typed value as a table of text would hold it; "" for null and for a number that is none.

    A whole number has no decimal point, also where it comes as a float (as integers beside nulls do); a truth value is
    true or false; a list or mapping is JSON.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return as_text(value).strip()
    if isinstance(value, bool | list | dict):
        return as_text(json.dumps(value, ensure_ascii=False))
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value)


def read_jsonl(path: Path, needed: Collection[str]) -> list[Row]:
    """Read a table of one JSON object a line; a key that a row leaves out is a cell that it has not.

    A line that is not UTF-8, not JSON or not an object becomes a row without cells and with a `problem`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as for `tables.read_table`; a column of `needed` is missing where no row has it.
    """
    check_table_file(path)
    rows: list[Row] = []
    num_bad = 0
    for line, content in _lines(path):
        try:
            rows.append(_json_row(line, content))
        except UnicodeDecodeError:
            num_bad += 1
            rows.append(Row(line, {}, "the row holds bytes that are not UTF-8 text"))
        except (ValueError, RecursionError) as error:
            rows.append(Row(line, {}, f"the row is not JSON ({str(error)[:200]})"))
        if len(rows) > MAX_ROWS:
            raise ValueError(f"{path} has more than {MAX_ROWS:,} rows; no more are read")
    check_bad_rows(path, num_bad, len(rows))
    check_columns(path, list(dict.fromkeys(name for row in rows for name in row.cells)), needed)
    return rows


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while content := file.readline(MAX_ROW_CHARS + 1):
            number += 1
            if len(content) > MAX_ROW_CHARS:
                raise ValueError(f"{path}, line {number}: the row has more than {MAX_ROW_CHARS:,} bytes")
            if number == 1:
                content = content.removeprefix(b"\xef\xbb\xbf")
            if content.strip():
                yield number, content


def _json_row(line: int, content: bytes) -> Row:
    values = json.loads(content.decode("utf-8"), object_pairs_hook=_object)
    if not isinstance(values, dict):
        return Row(line, {}, "the row is no JSON object")
    return Row(line, {as_text(name): value_as_text(value) for name, value in values.items()})


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def read_parquet(path: Path, needed: Collection[str]) -> list[Row]:
    """Read a parquet table of plain values; `Row.line` is the number of the row, from 1.

    An index that pandas wrote is kept out of the cells.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no parquet file or too large, a column of `needed` is missing from it, or a column holds
            something else than text, numbers, truth values and dates.
    """
    check_table_file(path)
    try:
        with pq.ParquetFile(path) as file:
            _check_parquet(path, file.metadata)
            schema = file.schema_arrow
            check_columns(path, schema.names, needed)
            _check_types(path, schema)
            texts = [field.name for field in schema if _is_text(field.type)]
        # Dictionaries stay dictionaries: a small file cannot say a long text a million times over.
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            columns = [name for name in schema.names if name and not name.startswith(_PANDAS_INDEX)]
            return list(_parquet_rows(path, file, columns))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet table: {str(error)[:300]}") from error


def _check_parquet(path: Path, metadata: pq.FileMetaData) -> None:
    if metadata.num_rows > MAX_ROWS:
        raise ValueError(f"{path} has {metadata.num_rows:,} rows; at most {MAX_ROWS:,} are read")
    size_bytes = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    if size_bytes > MAX_TABLE_BYTES:
        raise ValueError(f"{path} has {size_bytes:,} bytes when unpacked; at most {MAX_TABLE_BYTES:,} are read")


def _check_types(path: Path, schema: pa.Schema) -> None:
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        is_binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
        if pa.types.is_nested(kind) or is_binary:
            raise ValueError(
                f"{path}: the column {field.name!r} holds {field.type}; only text, numbers, truth values and dates are "
                "read, so leave it out"
            )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _parquet_rows(path: Path, file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[Row]:
    line = 0
    for batch in file.iter_batches(_BATCH, columns=list(columns)):
        for number, column in enumerate(batch.columns):
            texts = column.dictionary if pa.types.is_dictionary(column.type) else column
            if _is_text(texts.type) and any(len(text.as_buffer() or b"") > MAX_ROW_CHARS for text in texts):
                raise ValueError(
                    f"{path}, rows {line + 1} to {line + batch.num_rows}: a cell of {batch.schema.names[number]!r} has "
                    f"more than {MAX_ROW_CHARS:,} bytes"
                )
        for values in batch.to_pylist():
            line += 1
            yield Row(line, _cells(values))


def _cells(values: Mapping[str, Any]) -> dict[str, str]:
    return {name.strip(): value_as_text(value) for name, value in values.items()}
