"""The Visual Symptom Generator: asks a captioner about every image, judges the answers, keeps every one of them.

Answers are written as soon as they are there, a small file a batch. So the table follows from the files: who runs it
again after an interruption asks only what was not answered yet.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from derm_pipeline.artifacts import digest_of_json, write_table
from derm_pipeline.captions.claims import Facts
from derm_pipeline.captions.gate import Gate
from derm_pipeline.captions.known import known
from derm_pipeline.captions.llava_next import LlavaNextCaptioner, LlavaNextConfig
from derm_pipeline.captions.openai_server import OpenAiCaptioner, OpenAiConfig
from derm_pipeline.captions.prompted import PromptedCaptioner, PromptedConfig, seed_of
from derm_pipeline.captions.prompts import Answer, Prompt, Question, make_prompt
from derm_pipeline.captions.settings import CaptionerConfig, read_captioner_config
from derm_pipeline.captions.visual import VISUAL_CAPTION_SCHEMA
from derm_pipeline.captions.wording import class_name
from derm_pipeline.images import Pixels, decode, read_bytes

__all__ = [
    "CaptionerConfig",
    "ImageToCaption",
    "LlavaNextConfig",
    "OpenAiConfig",
    "describe_all",
    "make_captioner",
    "read_captioner_config",
]

_CODE = 2
"""Raised when the same answers would give other rows."""
_FALLBACK = "fallback"
_PARTS = "answers-"
_PART_SCHEMA = pa.schema(
    [
        pa.field("question_digest", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("is_complete", pa.bool_()),
        pa.field("problem", pa.string(), nullable=False),
    ]
)


def make_captioner(config: LlavaNextConfig | OpenAiConfig, *, api_key: str | None = None) -> PromptedCaptioner:
    """The prompted captioner that the settings describe.

    Args:
        config: Its settings.
        api_key: The key of the server, where the settings name one.

    Raises:
        FileNotFoundError, ValueError: it cannot be made; see each captioner.
    """
    if isinstance(config, LlavaNextConfig):
        return LlavaNextCaptioner(config)
    return OpenAiCaptioner(config, api_key=api_key)


@dataclass(frozen=True)
class ImageToCaption:
    """One image, and what is known of it."""

    path: Path
    sha256: str
    """Of the file's bytes."""
    facts: Facts = Facts()
    label: str | None = None
    """The class name, told to the captioner where its settings say so."""
    stand_in: str = ""
    """The descriptor's sentence: the caption where no answer passes the gate."""

    @classmethod
    def of(
        cls, path: Path, sha256: str, row: Mapping[str, Any], is_hairy: bool | None = None, stand_in: str = ""
    ) -> ImageToCaption:
        """The image of one row of the `records` table.

        The class name is the diagnosis in words, else the source's own label, else what the source's own caption names
        where it is a simple sentence ("An image of polyps"), as in Med-Art's tables.

        Raises:
            ValueError: the diagnosis or the modality is not in the vocabulary.
        """
        return cls(path, sha256, Facts.of(row, is_hairy), class_name(known(row)), stand_in)


@dataclass
class _Case:
    """An image on its way to a row."""

    item: ImageToCaption
    prompt: Prompt
    digest: str
    refused: list[str] = field(default_factory=list)
    """Why each answer so far was refused."""
    last_answer: str = ""


def describe_all(
    items: Sequence[ImageToCaption],
    captioner: PromptedCaptioner,
    gate: Gate,
    *,
    work: Path,
    batch_size: int | None = None,
    previous: pa.Table | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> pa.Table:
    """The captions of all images, in their order, with `VISUAL_CAPTION_SCHEMA`.

    An image is asked about until an answer passes the gate or the attempts are used up; then the descriptor's sentence
    stands in, and the verdict is "fallback". A row or answer made before is taken up
    where the image, the prompt, what is known and the settings are the same (`question_digest`).

    Args:
        items: The images; those with the same bytes, prompt and facts are asked about once.
        captioner: Answers.
        gate: Judges.
        work: A folder for the answers so far; to be kept when interrupted, and removed when the table is safe.
        batch_size: How many are asked about at once; that of the captioner's settings when left out.
        previous: An earlier table, whose rows are taken up.
        on_progress: Called with (images done, images).

    Raises:
        ValueError: an image's bytes are missing, broken or not those of its digest.
        OSError, ValueError: the captioner cannot answer; see `PromptedCaptioner.answer`. What it answered is kept.
    """
    settings = {"captioner": captioner.config.identity(), "gate": gate.config.model_dump(mode="json")}
    cases = [_case(item, captioner.config, settings) for item in items]
    unique = {case.digest: case for case in cases}
    rows = _taken_up(previous, unique)
    run = _Run(captioner, gate, work, rows)
    run.replay(unique)
    waiting = deque(case for digest, case in unique.items() if digest not in rows)
    size = batch_size or captioner.config.batch_size
    while waiting:
        batch = [waiting.popleft() for _ in range(min(size, len(waiting)))]
        # Refused ones first in the next batch: batches stay full, and none waits for the end.
        waiting.extendleft(reversed(run.ask(batch)))
        if on_progress:
            on_progress(len(unique) - len(waiting), len(unique))
    return pa.Table.from_pylist(
        [rows[case.digest] | {"sha256": case.item.sha256} for case in cases], schema=VISUAL_CAPTION_SCHEMA
    )


def _case(item: ImageToCaption, config: PromptedConfig, settings: Mapping[str, Any]) -> _Case:
    label = item.label if config.tell_label else None
    prompt = make_prompt(item.facts.modality, label, max_words=config.max_words)
    identity = {
        "code": _CODE,
        "image": item.sha256,
        "prompt": prompt.text,
        "facts": vars(item.facts),
        **settings,
    }
    return _Case(item, prompt, digest_of_json(identity))


def _taken_up(previous: pa.Table | None, cases: Mapping[str, _Case]) -> dict[str, dict[str, Any]]:
    """The rows of an earlier table that are wanted, by question digest; stand-ins are today's."""
    if previous is None or "question_digest" not in previous.column_names:
        return {}
    names = [name for name in VISUAL_CAPTION_SCHEMA.names if name in previous.column_names]
    wanted = previous.select(names).filter(pa.compute.is_in(previous["question_digest"], pa.array(sorted(cases))))
    rows = {row["question_digest"]: row for row in wanted.to_pylist()}
    for digest, row in rows.items():
        if row["verdict"] == _FALLBACK:
            row["text"] = cases[digest].item.stand_in
    return rows


@dataclass
class _Run:
    """Asks, keeps and judges."""

    captioner: PromptedCaptioner
    gate: Gate
    work: Path
    rows: dict[str, dict[str, Any]]
    """The finished rows by question digest; grows."""

    def replay(self, cases: dict[str, _Case]) -> None:
        """Take up the answers of an interrupted run."""
        parts = [pq.read_table(path, schema=_PART_SCHEMA) for path in sorted(self.work.glob(f"{_PARTS}*.parquet"))]
        answers = pa.concat_tables(parts).sort_by("attempt").to_pylist() if parts else []
        for row in answers:
            case = cases.get(row["question_digest"])
            if case is not None and case.digest not in self.rows and row["attempt"] == len(case.refused):
                self._settle(case, Answer(row["text"], row["is_complete"], row["problem"]))

    def ask(self, batch: Sequence[_Case]) -> list[_Case]:
        """Ask about each image once; those that are to be asked about again."""
        answers = self.captioner.answer([self._question(case) for case in batch])
        self._keep(batch, answers)
        for case, answer in zip(batch, answers, strict=True):
            self._settle(case, answer)
        return [case for case in batch if case.digest not in self.rows]

    def _seed(self, case: _Case) -> int:
        return seed_of(self.captioner.config.seed, case.item.sha256, len(case.refused))

    def _question(self, case: _Case) -> Question:
        # A JPEG may be decoded smaller: no smaller than what the captioner is shown.
        reduce_to_px = math.isqrt(self.captioner.config.max_pixels) + 1
        return Question(_read(case.item, reduce_to_px), case.prompt, self._seed(case))

    def _keep(self, batch: Sequence[_Case], answers: Sequence[Answer]) -> None:
        rows = [
            {"question_digest": case.digest, "attempt": len(case.refused), **vars(answer)}
            for case, answer in zip(batch, answers, strict=True)
        ]
        self.work.mkdir(parents=True, exist_ok=True)
        name = f"{_PARTS}{batch[0].digest[:24]}-{len(batch[0].refused)}.parquet"
        write_table(self.work / name, pa.Table.from_pylist(rows, schema=_PART_SCHEMA))

    def _settle(self, case: _Case, answer: Answer) -> None:
        """Judge an answer: the image has its row, or one refusal more."""
        seed = self._seed(case)
        verdict = self.gate.judge(answer, case.item.facts, case.prompt)
        case.last_answer = answer.text
        if not verdict.accepted:
            case.refused.append(str(verdict))
        if verdict.accepted:
            self._finish(case, "accepted", verdict.text, len(case.refused) + 1, seed)
        elif len(case.refused) >= self.captioner.config.num_attempts:
            self._finish(case, _FALLBACK, case.item.stand_in, len(case.refused), seed)

    def _finish(self, case: _Case, verdict: str, text: str, attempts: int, seed: int) -> None:
        count = self.gate.count_tokens
        self.rows[case.digest] = {
            "captioner": self.captioner.name,
            "text": text,
            "model": self.captioner.model,
            "verdict": verdict,
            "raw_answer": case.last_answer,
            "gate_reasons": list(case.refused),
            "attempts": attempts,
            "seed": seed,
            "num_tokens": None if count is None else count(text),
            "prompt": case.prompt.text,
            "question_digest": case.digest,
        }


def _read(item: ImageToCaption, reduce_to_px: int | None = None) -> Pixels:
    try:
        content = read_bytes(item.path)
        if hashlib.sha256(content).hexdigest() != item.sha256:
            raise ValueError("its bytes are no longer those of its record; make the records again")
        return decode(content, reduce_to_px=reduce_to_px)
    except ValueError as error:
        raise ValueError(f"{item.path}: {error}") from error
