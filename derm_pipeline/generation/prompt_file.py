"""Prompts with their settings, one a line, in the syntax of kohya's sample prompts.

"photo of a nevus --n blurry --w 1024 --h 768 --d 7 --l 7.5 --s 28": negative prompt, width and height in pixels, seed,
guidance and steps. Empty lines and those that begin with # are passed over. Words are taken as they stand: a weight as
in "(blurry:1.3)" weighs nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from derm_pipeline.records import Diagnosis, SkinType

_MAX_BYTES = 10_000_000
_SIGN = " --"


class Prompt(BaseModel):
    """What a text-to-image generator is asked for; what is not said is as the plan's settings say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(min_length=1)
    """The words."""
    negative_prompt: str | None = None
    """What guidance goes away from."""
    guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Classifier-free guidance; 1 is none."""
    num_steps: int | None = Field(default=None, ge=1)
    """Evaluations of the network."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of the first sample of this prompt."""
    width_px: int | None = Field(default=None, ge=8, le=8192)
    """Width of the image, pixels; with `height_px`."""
    height_px: int | None = Field(default=None, ge=8, le=8192)
    """Height of the image, pixels; with `width_px`."""
    diagnosis: Diagnosis | None = None
    """What the sample shows; None is the plan's diagnosis."""
    skin_type: SkinType | None = None
    """On what skin."""

    @model_validator(mode="after")
    def _has_both_sides(self) -> Self:
        if (self.width_px is None) != (self.height_px is None):
            raise ValueError("a width and a height: both, or neither")
        return self


_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("negative_prompt", str),
    "w": ("width_px", int),
    "h": ("height_px", int),
    "d": ("seed", int),
    "l": ("guidance", float),
    "s": ("num_steps", int),
}


def parse_prompt(line: str) -> Prompt:
    """One prompt with its options.

    Raises:
        ValueError: no words, an option that is not known or said twice, or a value that does not fit it.
    """
    text, *options = f" {line.strip()}".split(_SIGN)
    found: dict[str, Any] = {"text": text.strip()}
    for option in options:
        sign, _, value = option.strip().partition(" ")
        if sign.lower() not in _OPTIONS:
            known = ", ".join(f"--{sign}" for sign in _OPTIONS)
            raise ValueError(f"--{option.strip()}: there is no option --{sign}; there are {known}")
        name, kind = _OPTIONS[sign.lower()]
        if name in found:
            raise ValueError(f"--{sign} is said twice")
        try:
            found[name] = kind(value.strip())
        except ValueError as error:
            raise ValueError(f"--{sign} {value.strip()!r} is no {kind.__name__}") from error
    try:
        return Prompt.model_validate(found)
    except ValidationError as error:
        said = error.errors()[0]
        where = f"{said['loc'][0]}: " if said["loc"] else ""
        raise ValueError(where + said["msg"].removeprefix("Value error, ")) from error


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no prompt, with its number; the file is empty, not UTF-8 or larger than 10 MB.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the prompts are looked for in {path.absolute()}, which is no file")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; at most {_MAX_BYTES:,} are read")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error})") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            prompts.append(parse_prompt(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts
