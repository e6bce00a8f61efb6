"""Captions as files beside the images, in the forms that trainers read, and back.

- `metadata.csv`, `metadata.jsonl`: one table, file_name and text. Hugging Face's `imagefolder` (which refuses a folder
  that holds both).
- `.caption`, `.txt`: a side file for each image, its name with that suffix, without a line end. kohya's sd-scripts, and
  the captions of the ISIC 2020 melanomas.
- `kohya`: `meta_cap.json`, {key: {"caption": text}}. kohya's sd-scripts (`in_json`).
- `skin_diff`: `skin_diff.json`, [{image_path, label, skin_type, prompt}]. From Majority to Minority's LoRA training;
  the paths are within the folder.

kohya's `merge_captions_to_metadata.py` keys an image by its stem (or by its path as globbed, with `--full_path`), and
its trainer looks for `<image_dir>/<key>.<image suffix>`. Our key is the path within the folder without its suffix: the
stem for an image at the top, and one that the trainer finds for those in subfolders too.

A file is written aside and renamed, and left alone when it already holds the same bytes. One that another tool has made
and that says more than captions (other columns, tags) is refused, not overwritten.
"""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, get_args

from derm_pipeline.artifacts import replacing
from derm_pipeline.captions.known import one_line
from derm_pipeline.records import SkinType

Carrier = Literal["metadata.csv", "metadata.jsonl", ".caption", ".txt", "kohya", "skin_diff"]
CARRIERS: tuple[Carrier, ...] = get_args(Carrier)

_FILES: dict[Carrier, str] = {
    "metadata.csv": "metadata.csv",
    "metadata.jsonl": "metadata.jsonl",
    "kohya": "meta_cap.json",
    "skin_diff": "skin_diff.json",
}
"""The one file of a carrier that has one; the others write a side file for each image."""

_MAX_SIDE_FILE_BYTES = 2**16
_MAX_FILE_BYTES = 2**30
_FIELDS = ("file_name", "text")
_SKIN_DIFF_FIELDS = ("image_path", "label", "skin_type", "prompt")


class Caption(NamedTuple):
    """One image and what is said of it; a (file_name, text) pair will do wherever one is asked for."""

    file_name: str
    """Path within the folder, with forward slashes and the image's suffix."""
    text: str
    label: str | None = None
    """The condition; only `skin_diff` carries it, and needs it."""
    skin_type: int | None = None
    """Fitzpatrick type, 1 to 6, None where unknown; only `skin_diff` carries it."""


def write_captions(folder: Path, rows: Iterable[Caption | tuple[str, str]], carrier: Carrier) -> list[Path]:
    """Write captions into a folder; the same rows give the same bytes, however often.

    A text is written in Unicode normal form C on one line: line ends, control characters and runs of blanks are one
    blank. The images themselves need not be there.

    Args:
        folder: Where the images lie, or shall; made when missing.
        rows: One for each image, in the order in which a table shall list them.
        carrier: The form.

    Returns:
        The files that now hold the captions.

    Raises:
        ValueError: a name leaves the folder or is no image's, comes twice (for side files and kohya: also with another
            suffix), a text is empty, a label is missing for `skin_diff`, a
            skin type is none, or the file holds more than captions.
    """
    captions = [_checked(Caption(*row)) for row in rows]
    if carrier not in CARRIERS:
        raise ValueError(f"carrier {carrier!r} is not known; it must be one of {', '.join(CARRIERS)}")
    by_stem = carrier in (".caption", ".txt", "kohya")
    _refuse_twice([image_key(caption.file_name) if by_stem else caption.file_name for caption in captions])
    if carrier == ".caption" or carrier == ".txt":
        return _write_side_files(folder, captions, carrier)
    path = folder / _FILES[carrier]
    _refuse_to_lose(path, carrier)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(path, _TO_TEXT[carrier](captions).encode())
    return [path]


def read_captions(folder: Path, carrier: Carrier) -> list[Caption]:
    """The captions that a folder holds in one form, written by us or by another tool.

    Side files come in alphabetical order. They and kohya's keys do not say an image's suffix: the file name is that of
    the image that lies there, or is without a suffix where none does (a README.txt reads as a caption of "README").

    Raises:
        FileNotFoundError: there is no such file, or no side file at all.
        ValueError: a file is not what the carrier says, is not UTF-8, or is too large; a name leaves the folder; or two
            images could be meant.
    """
    if carrier not in CARRIERS:
        raise ValueError(f"carrier {carrier!r} is not known; it must be one of {', '.join(CARRIERS)}")
    if carrier == ".caption" or carrier == ".txt":
        texts = {str(name.with_suffix("")): text for name, text in _read_side_files(folder, carrier)}
        return _with_images(folder, texts)
    path = folder / _FILES[carrier]
    text = _read(path, _MAX_FILE_BYTES)
    try:
        if carrier == "kohya":
            return _with_images(folder, _kohya_texts(_parsed(text)))
        return [_folded(caption) for caption in _FROM_TEXT[carrier](text)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def image_key(file_name: str) -> str:
    """An image's path without its suffix: how side files and kohya name it."""
    return str(PurePosixPath(file_name).with_suffix(""))


def _checked(caption: Caption) -> Caption:
    caption = _folded(caption)
    if not PurePosixPath(caption.file_name).suffix:
        raise ValueError(f"{caption.file_name!r} has no suffix; give the image's whole file name")
    if not caption.text:
        raise ValueError(f"the caption of {caption.file_name!r} is empty")
    try:
        f"{caption.file_name}{caption.text}{caption.label}".encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the caption of {caption.file_name!r} cannot be written as UTF-8: {error}") from error
    return caption


def _folded(caption: Caption) -> Caption:
    """With its text on one line, its skin type within the scale, and its name sure to stay in the folder."""
    _check_name(caption.file_name)
    label = None if caption.label is None else one_line(caption.label)
    skin_type = None if caption.skin_type is None else int(SkinType(caption.skin_type))
    return Caption(caption.file_name, one_line(caption.text), label, skin_type)


def _check_name(name: str) -> None:
    parts = name.split("/")
    is_strange = "\\" in name or any(unicodedata.category(char) == "Cc" for char in name)
    if is_strange or any(not part or part.startswith(".") for part in parts) or parts[0].endswith(":"):
        raise ValueError(
            f"{name!r} is not the name of an image in this folder; "
            "give a relative path with forward slashes, without hidden parts and '..'"
        )


def _refuse_twice(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{name!r} comes twice; an image has one caption")
        seen.add(name)


def _write_side_files(folder: Path, captions: Sequence[Caption], suffix: str) -> list[Path]:
    for caption in captions:
        if PurePosixPath(caption.file_name).suffix == suffix:
            raise ValueError(f"{caption.file_name!r} would be overwritten by its own caption; it is no image")
    root = folder.resolve()
    for parent in {PurePosixPath(caption.file_name).parent for caption in captions}:
        where = (root / parent).resolve()  # before anything is made: a link may lead elsewhere
        if not where.is_relative_to(root):
            raise ValueError(f"{folder / parent} leads out of {folder}; nothing was written")
        where.mkdir(parents=True, exist_ok=True)
    paths = [folder / PurePosixPath(caption.file_name).with_suffix(suffix) for caption in captions]
    for path, caption in zip(paths, captions, strict=True):
        _replace(path, caption.text.encode())
    return paths


def _replace(path: Path, content: bytes) -> None:
    if (
        path.is_file()
        and not path.is_symlink()
        and path.stat().st_size == len(content)
        and path.read_bytes() == content
    ):
        return
    with replacing(path) as aside:
        aside.unlink(missing_ok=True)  # never through a link that lies there
        aside.write_bytes(content)


def _refuse_to_lose(path: Path, carrier: Carrier) -> None:
    """Refuse to overwrite a file that holds more than the captions of this carrier."""
    if not path.exists():
        return
    try:
        more = _MORE_THAN_CAPTIONS[carrier](_read(path, _MAX_FILE_BYTES))
    except ValueError as error:
        raise ValueError(f"{path} is there and is not a file of captions ({error}); move it away first") from error
    if more:
        raise ValueError(f"{path} also holds {', '.join(sorted(more))}, which would be lost; move it away first")


def _read(path: Path, max_bytes: int) -> str:
    with path.open("rb") as handle:
        content = handle.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path} is larger than {max_bytes} bytes; that is no file of captions")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _read_side_files(folder: Path, suffix: str) -> list[tuple[PurePosixPath, str]]:
    """Names and texts, by name; hidden files are not captions, nor are links that lead out."""
    root = folder.resolve()
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
    if not found:
        raise FileNotFoundError(f"no {suffix} file in {folder}; write the captions first")
    outside = [path for path in found if not path.resolve().is_relative_to(root)]
    if outside:
        raise ValueError(f"{outside[0]} leads out of {folder}")
    return [
        (PurePosixPath(path.relative_to(folder).as_posix()), one_line(_read(path, _MAX_SIDE_FILE_BYTES)))
        for path in sorted(found)
    ]


def _with_images(folder: Path, texts: Mapping[str, str]) -> list[Caption]:
    """Captions by the names of the images that lie in the folder."""
    images: dict[str, list[str]] = {}
    for where, _, names in os.walk(folder):
        for name in names:
            path = PurePosixPath(Path(where, name).relative_to(folder).as_posix())
            if path.suffix.lower() in _IMAGE_SUFFIXES:
                images.setdefault(str(path.with_suffix("")), []).append(str(path))
    captions = []
    for key, text in texts.items():
        there = images.get(key, [key])
        if len(there) > 1:
            raise ValueError(f"the caption of {key!r} in {folder} may mean {' or '.join(sorted(there))}")
        captions.append(Caption(there[0], text))
    return captions


_IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def _to_csv(captions: Sequence[Caption]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_FIELDS, *((caption.file_name, caption.text) for caption in captions)])
    return text.getvalue()


def _to_jsonl(captions: Sequence[Caption]) -> str:
    rows = ({"file_name": caption.file_name, "text": caption.text} for caption in captions)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _to_kohya(captions: Sequence[Caption]) -> str:
    return _json({image_key(caption.file_name): {"caption": caption.text} for caption in captions})


def _to_skin_diff(captions: Sequence[Caption]) -> str:
    for caption in captions:
        if not caption.label:
            raise ValueError(f"{caption.file_name!r} has no label, which skin_diff needs")
    return _json(
        [
            dict(zip(_SKIN_DIFF_FIELDS, (row.file_name, row.label, row.skin_type, row.text), strict=True))
            for row in captions
        ]
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _csv_rows(text: str) -> list[dict[str, Any]]:
    try:
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"not a CSV table: {error}") from error


def _jsonl_rows(text: str) -> list[dict[str, Any]]:
    return _mappings([_parsed(line) for line in text.split("\n") if line.strip()])


def _skin_diff_rows(text: str) -> list[dict[str, Any]]:
    return _mappings(_parsed(text))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def _mappings(rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("this is not a list of objects")
    return rows


def _from_rows(rows: Iterable[Mapping[str, Any]], name: str, text: str) -> list[Caption]:
    captions = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get(name), str) or not isinstance(row.get(text), str):
            raise ValueError(f"entry {number} has no {name} or no {text}")
        label, skin_type = row.get("label"), row.get("skin_type")
        is_skin_diff = name == "image_path"
        if is_skin_diff and not (isinstance(label, str) and isinstance(skin_type, int | None)):
            raise ValueError(f"entry {number} has no label, or a skin type that is no number")
        captions.append(Caption(row[name], row[text], *((label, skin_type) if is_skin_diff else ())))
    return captions


def _kohya_texts(entries: Any) -> dict[str, str]:
    if not isinstance(entries, dict):
        raise ValueError("this is not an object of {image: {caption}}")
    texts = {}
    for key, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str):
            raise ValueError(f"entry {key!r} has no caption")
        _check_name(key)
        texts[key] = one_line(entry["caption"])
    return texts


def _kohya_more(text: str) -> set[str]:
    entries = _parsed(text)
    _kohya_texts(entries)
    return {name for entry in entries.values() for name in entry} - {"caption"}


def _more(rows: Iterable[Mapping[str, Any]], fields: Iterable[str]) -> set[str]:
    return {str(name) for row in rows for name in row} - set(fields)


_TO_TEXT: dict[Carrier, Callable[[Sequence[Caption]], str]] = {
    "metadata.csv": _to_csv,
    "metadata.jsonl": _to_jsonl,
    "kohya": _to_kohya,
    "skin_diff": _to_skin_diff,
}
_FROM_TEXT: dict[Carrier, Callable[[str], list[Caption]]] = {
    "metadata.csv": lambda text: _from_rows(_csv_rows(text), *_FIELDS),
    "metadata.jsonl": lambda text: _from_rows(_jsonl_rows(text), *_FIELDS),
    "skin_diff": lambda text: _from_rows(_skin_diff_rows(text), "image_path", "prompt"),
}
_MORE_THAN_CAPTIONS: dict[Carrier, Callable[[str], set[str]]] = {
    "metadata.csv": lambda text: _more(_csv_rows(text), _FIELDS),
    "metadata.jsonl": lambda text: _more(_jsonl_rows(text), _FIELDS),
    "kohya": _kohya_more,
    "skin_diff": lambda text: _more(_skin_diff_rows(text), _SKIN_DIFF_FIELDS),
}
