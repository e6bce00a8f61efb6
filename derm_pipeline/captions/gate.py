"""The quality gate: whether an answer may become a caption, and if not, why.

Med-Art's gate (reject an echo of the prompt, count tokens, demand the opening) redone: bounded, counted with the
tokenizer of whoever will read the captions, and held against what is known of the image.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from derm_pipeline.captions.chat import markup, not_a_description, tidy
from derm_pipeline.captions.claims import Facts, contradictions, diagnoses_named
from derm_pipeline.captions.known import names_unknown
from derm_pipeline.captions.prompts import Answer, Prompt

CountTokens = Callable[[str], int]
"""A text -> how many tokens its reader makes of it."""


class GateConfig(BaseModel):
    """What a caption must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_words: int = Field(default=8, ge=1)
    """Fewer words are too short, those that the prompt gave as the opening not counted."""
    max_words: int = Field(default=120, ge=1)
    """More words are too long (the prompt asks for 100, a fifth more is let pass). Only where no tokenizer is set."""
    tokenizer: str | None = None
    """Folder with the tokenizer of the generator that will read the captions (tokenizer.json, or what transformers
    reads); None counts words instead."""
    max_tokens: int = Field(default=120, ge=1)
    """With a tokenizer: more tokens, special ones included, are too long. PixArt reads 120, Stable Diffusion 77."""
    echo_words: int = Field(default=6, ge=2)
    """As many words in a row that stand in the prompt too (its opening apart) are an echo of it."""
    echo_fraction: float = Field(default=0.5, gt=0, le=1)
    """As large a part of the answer's word triples in the prompt is an echo of it."""


class Reason(StrEnum):
    """Why an answer is refused."""

    EMPTY = "empty"
    REFUSAL = "refusal"
    """The captioner declines, speaks of itself or to its reader."""
    GARBAGE = "garbage"
    TRUNCATED = "truncated"
    PROMPT_ECHO = "prompt_echo"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    DIAGNOSIS_NAMED = "diagnosis_named"
    CONTRADICTION = "contradiction"
    NAMES_UNKNOWN = "names_unknown"
    """It says "unknown", "none" or "N/A", which no caption may."""


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one answer."""

    accepted: bool
    reason: Reason | None
    """None where accepted."""
    text: str
    """The answer, tidied: the caption where accepted."""
    detail: str = ""
    """What exactly was refused."""

    def __str__(self) -> str:
        if self.reason is None:
            return "accepted"
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


class Gate:
    """Judges answers; the same answer gets the same verdict."""

    def __init__(self, config: GateConfig | None = None, count_tokens: CountTokens | None = None) -> None:
        """A gate.

        Args:
            config: Its bounds; the defaults when left out.
            count_tokens: Counts instead of the tokenizer that the settings name.

        Raises:
            FileNotFoundError: the tokenizer that the settings name is not there.
            ValueError: it cannot be read.
        """
        self.config = config or GateConfig()
        if count_tokens is None and self.config.tokenizer is not None:
            count_tokens = load_token_counter(Path(self.config.tokenizer))
        self.count_tokens = count_tokens
        """The reader's tokens of a text; None where no tokenizer is known."""

    def judge(self, answer: Answer, facts: Facts, prompt: Prompt) -> Verdict:
        """Whether the answer may become the image's caption.

        Args:
            answer: What the captioner said.
            facts: What is known of the image.
            prompt: What the captioner was asked; a diagnosis may be named only where the prompt told a label.
        """
        text = tidy(answer.text, prompt)
        found = self._form(answer, text, prompt) or self._content(text, facts, prompt)
        return Verdict(True, None, text) if found is None else Verdict(False, found[0], text, found[1])

    def _form(self, answer: Answer, text: str, prompt: Prompt) -> tuple[Reason, str] | None:
        if not any(letter.isalnum() for letter in text):
            return Reason.EMPTY, answer.problem
        own = _without_opening(text, prompt)  # the opening, which may be ours, is neither length nor sense
        declined = not_a_description(own)
        if declined:
            return Reason.REFUSAL, repr(declined)
        garbage = _garbage(own)
        if garbage:
            return Reason.GARBAGE, garbage
        ends = re.search(r"[.!?][\"')\]]*$", text) is not None
        if answer.is_complete is False or (answer.is_complete is None and not ends):
            return Reason.TRUNCATED, f"ends with {text[-20:]!r}"
        echo = self._echo(text, prompt)
        if echo:
            return Reason.PROMPT_ECHO, echo
        num_words = len(_words(own))
        if num_words < self.config.min_words:
            return Reason.TOO_SHORT, f"{num_words} words; at least {self.config.min_words}"
        return self._length(text)

    def _length(self, text: str) -> tuple[Reason, str] | None:
        if self.count_tokens is None:
            count, bound, what = len(text.split()), self.config.max_words, "words"
        else:
            count, bound, what = self.count_tokens(text), self.config.max_tokens, "tokens"
        return (Reason.TOO_LONG, f"{count} {what}; at most {bound}") if count > bound else None

    def _content(self, text: str, facts: Facts, prompt: Prompt) -> tuple[Reason, str] | None:
        if prompt.label is None:
            named = diagnoses_named(text)
            if named:
                return Reason.DIAGNOSIS_NAMED, ", ".join(named)
        else:
            # The told label is not the captioner's claim, whatever other words it holds.
            text = re.sub(re.escape(prompt.label), " ", text, flags=re.IGNORECASE)
        found = contradictions(text, facts)
        if found:
            return Reason.CONTRADICTION, "; ".join(found)
        return (Reason.NAMES_UNKNOWN, "") if names_unknown(text) else None

    def _echo(self, text: str, prompt: Prompt) -> str:
        """The part of the prompt that the answer repeats; "" where it repeats none."""
        instruction = _INSTRUCTION.search(text)
        if instruction:
            return instruction.group()
        asked = _words(_without_opening(prompt.text, prompt))
        said = _words(_without_opening(text, prompt))
        runs = _runs(asked, self.config.echo_words)
        for run in _run_list(said, self.config.echo_words):
            if run in runs:
                return " ".join(run)
        triples, known = _run_list(said, 3), _runs(asked, 3)
        shared = sum(triple in known for triple in triples)
        if triples and shared / len(triples) >= self.config.echo_fraction:
            return f"{shared} of {len(triples)} word triples"
        return ""


_INSTRUCTION = re.compile(
    r"\bplease describe\b|\bfollowing (?:visual )?features\b|\bensure (?:that )?the description\b|"
    r"\bexceed \d+ words\b|\bdo not name a diagnosis\b",
    re.IGNORECASE,
)
"""Words of every prompt that no description holds."""


def _garbage(text: str) -> str:
    """What makes a text no sentence of English; "" where nothing does."""
    strange = next((letter for letter in text if unicodedata.category(letter)[0] == "C" or letter == "\ufffd"), None)
    if strange is not None:
        return f"character U+{ord(strange):04X}"
    marked = markup(text)
    if marked:
        return f"holds {marked!r}"
    visible = [letter for letter in text if not letter.isspace()]
    plain = sum(letter.isascii() and (letter.isalnum() or letter in ".,;:'\"()-/%") for letter in visible)
    if plain < 0.9 * len(visible):
        return f"{len(visible) - plain} of {len(visible)} characters are not plain Latin text"
    words = _words(text)
    if sum(word.isalpha() or "-" in word for word in words) < 0.7 * len(words):
        return "too few words"
    return _foreign(words) or _repeated(text, words)


def _foreign(words: list[str]) -> str:
    """The little words of another language, where they are more than the English ones."""
    foreign = [word for word in words if word in _FOREIGN_WORDS]
    is_foreign = len(foreign) >= 3 and len(foreign) > sum(word in _ENGLISH_WORDS for word in words)
    return f"not English: {' '.join(sorted(set(foreign)))}" if is_foreign else ""


_ENGLISH_WORDS = frozenset(re.findall(r"\w+", "the of and is with are has which its an at from there this that as by"))
_FOREIGN_WORDS = frozenset(
    re.findall(
        r"\w+",
        "le la les des un une est avec et dans sur du cette ce qui sont el los las una del con por es y der die das "
        "ein eine und mit ist auf den il lo gli di che della um uma com os da em na een het van en",
    )
)
"""French, Spanish, German, Italian, Portuguese and Dutch, which are Latin letters too."""


def _repeated(text: str, words: list[str]) -> str:
    sentences = Counter(tuple(_words(sentence)) for sentence in re.split(r"[.!?]\s", text))
    for sentence, count in sentences.items():
        if count > 1 and len(sentence) >= 4:
            return f"repeats {' '.join(sentence)!r}"
    for length, most in ((1, 3), (2, 2), (3, 2)):
        for start in range(len(words) - length * most):
            piece = words[start : start + length]
            if words[start : start + length * (most + 1)] == piece * (most + 1):
                return f"repeats {' '.join(piece)!r}"
    commonest = Counter(_run_list(words, 3)).most_common(1)
    if commonest and commonest[0][1] >= 4:
        return f"repeats {' '.join(commonest[0][0])!r}"
    return ""


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9][a-z0-9'-]*", text.lower())


def _without_opening(text: str, prompt: Prompt) -> str:
    return re.sub(re.escape(prompt.opening), " . ", text, flags=re.IGNORECASE)


def _run_list(words: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


def _runs(words: list[str], length: int) -> set[tuple[str, ...]]:
    return set(_run_list(words, length))


def load_token_counter(folder: Path) -> CountTokens:
    """How many tokens the tokenizer in a folder makes of a text, its special tokens included and nothing cut off.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no tokenizer in it that can be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"the gate's tokenizer is looked for in {folder}, which is not a folder")
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
        fast.no_truncation()  # else a long text would count as one that just fits
        fast.no_padding()
        return lambda text: len(fast.encode(text).ids)
    from transformers import AutoTokenizer

    try:
        slow: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer in {folder} can be read: {str(error).splitlines()[0]}") from error
    return lambda text: len(slow(text, truncation=False)["input_ids"])
