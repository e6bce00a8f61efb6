"""The Visual Symptom Generator as a whole: what is asked, kept, judged and taken up again."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from derm_pipeline.captions.claims import Facts
from derm_pipeline.captions.descriptors import measure
from derm_pipeline.captions.gate import Gate, GateConfig
from derm_pipeline.captions.llava_next import LlavaNextCaptioner, LlavaNextConfig
from derm_pipeline.captions.prompted import PromptedConfig, seed_of
from derm_pipeline.captions.prompts import Answer
from derm_pipeline.captions.segmentation import see
from derm_pipeline.captions.symptoms import (
    CaptionerConfig,
    ImageToCaption,
    describe_all,
    make_captioner,
)
from derm_pipeline.captions.tiny import write_tiny_llava_next
from derm_pipeline.captions.visual import VISUAL_CAPTION_SCHEMA, DescriptorConfig, sentence
from derm_pipeline.images import encode_png
from derm_pipeline.records import Diagnosis, Modality, Sex
from derm_pipeline.sources.phantom.drawing import PhantomConfig, draw, plan

DONE = "the lesion number {} is round and light brown with a regular network and a smooth edge."


class Scripted:
    """Answers by what its function makes of (question, how many were asked before); counts what it is asked."""

    name = "scripted"
    model = "recorded"

    def __init__(self, script=None, config=None, stop_after=None):
        self.config = config or PromptedConfig(batch_size=4)
        self.script = script or (lambda question, _: good(question))
        self.stop_after = stop_after
        self.batches = []
        self.asked = []

    def answer(self, questions):
        if self.stop_after is not None and len(self.batches) == self.stop_after:
            raise ConnectionError("the plug was pulled")
        self.batches.append(len(questions))
        answers = [self.script(question, len(self.asked)) for question in questions]
        self.asked += [question.seed for question in questions]
        return answers


def good(question):
    return Answer(f"{question.prompt.opening}, {DONE.format(question.seed)}", True)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Twelve phantoms on disk."""
    folder = tmp_path_factory.mktemp("phantoms")
    found = []
    for case in plan(PhantomConfig(num_images=12, seed=int(np.random.default_rng().integers(1000)))):
        phantom = draw(case)
        path = folder / f"{case.image_id}.png"
        path.write_bytes(encode_png(phantom.image))
        is_hairy = "hair" in case.artefacts
        facts = Facts(diagnosis=case.diagnosis, sex=case.sex, skin_type=case.skin_type, is_hairy=is_hairy)
        stand_in = sentence(measure(see(phantom.image, phantom.hair_mask)), is_hairy)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        found.append(ImageToCaption(path, sha256, facts, case.diagnosis.phrase, stand_in))
    return found


def seeds_of(items, attempt=0, seed=0):
    return [seed_of(seed, item.sha256, attempt) for item in items]


def test_good_answers_become_rows_in_the_order_of_the_images(items, tmp_path):
    progress = []
    captioner = Scripted()
    table = describe_all(
        items, captioner, Gate(), work=tmp_path, on_progress=lambda done, total: progress.append((done, total))
    )
    assert table.schema == VISUAL_CAPTION_SCHEMA
    assert table["sha256"].to_pylist() == [item.sha256 for item in items]
    assert captioner.batches == [4, 4, 4]
    assert captioner.asked == seeds_of(items) == table["seed"].to_pylist()
    assert progress == [(4, 12), (8, 12), (12, 12)]
    for row, item in zip(table.to_pylist(), items, strict=True):
        assert row["text"] == row["raw_answer"]
        assert row["text"].startswith(f"A dermoscopic image of {item.label}, the lesion")
        assert f"the dermoscopic image of {item.label} using" in row["prompt"]
        assert (row["verdict"], row["attempts"], row["gate_reasons"]) == ("accepted", 1, [])
        assert (row["captioner"], row["model"], row["num_tokens"]) == ("scripted", "recorded", None)


def test_a_refused_answer_is_asked_for_again_with_another_seed_in_a_full_batch(items, tmp_path):
    refused = set(seeds_of(items[:3]))
    captioner = Scripted(lambda question, _: Answer("", None) if question.seed in refused else good(question))
    table = describe_all(items, captioner, Gate(), work=tmp_path)
    assert captioner.batches == [4, 4, 4, 3]
    assert table["attempts"].to_pylist() == [2] * 3 + [1] * 9
    assert table["gate_reasons"].to_pylist() == [["empty"]] * 3 + [[]] * 9
    assert table["seed"].to_pylist() == seeds_of(items[:3], 1) + seeds_of(items[3:])
    assert set(table["verdict"].to_pylist()) == {"accepted"}


def test_what_never_passes_falls_back_to_the_descriptors_sentence_and_is_marked(items, tmp_path):
    wrong = Answer("A dermoscopic image. This is a brown lesion typical of vitiligo, with a smooth edge.", True)
    captioner = Scripted(lambda *_: wrong, PromptedConfig(max_attempts=2, batch_size=5))
    table = describe_all(items, captioner, Gate(), work=tmp_path)
    assert len(captioner.asked) == 24
    for row, item in zip(table.to_pylist(), items, strict=True):
        assert row["text"] == item.stand_in != ""
        assert (row["verdict"], row["attempts"], row["raw_answer"]) == ("fallback", 2, wrong.text)
        assert [reason.split(":")[0] for reason in row["gate_reasons"]] == ["contradiction"] * 2
        assert row["seed"] == seed_of(0, item.sha256, 1)


def test_a_label_is_told_only_where_the_settings_say_so(items, tmp_path):
    captioner = Scripted(config=PromptedConfig(tell_label=False))
    table = describe_all(items[:2], captioner, Gate(), work=tmp_path)
    for row, item in zip(table.to_pylist(), items, strict=False):
        assert item.label not in row["prompt"]
        assert item.label not in row["text"]


def test_an_interrupted_run_loses_one_batch_and_the_next_asks_only_the_rest(items, tmp_path):
    refused = set(seeds_of(items[:2]))

    def script(question, _):
        return Answer("", None) if question.seed in refused else good(question)

    whole = describe_all(items, Scripted(script), Gate(), work=tmp_path / "whole")
    first = Scripted(script, stop_after=2)
    with pytest.raises(ConnectionError):
        describe_all(items, first, Gate(), work=tmp_path / "halves")
    assert len(first.asked) == 8
    second = Scripted(script)
    table = describe_all(items, second, Gate(), work=tmp_path / "halves")
    assert table.equals(whole)
    assert len(second.asked) == 14 - 8
    assert not set(first.asked) & set(second.asked)
    third = Scripted(script)
    assert describe_all(items, third, Gate(), work=tmp_path / "halves").equals(whole)
    assert third.asked == []


def test_rows_of_an_earlier_table_are_taken_up_and_new_images_asked(items, tmp_path):
    previous = describe_all(items[:9], Scripted(), Gate(), work=tmp_path / "a")
    captioner = Scripted()
    shuffled = items[::-1]
    extended = previous.append_column("source", pa.array(["x"] * 9))
    table = describe_all(shuffled, captioner, Gate(), work=tmp_path / "b", previous=extended)
    assert captioner.asked == seeds_of(shuffled[:3])
    assert table.equals(describe_all(shuffled, Scripted(), Gate(), work=tmp_path / "c"))


@pytest.mark.parametrize("change", ["setting", "gate", "facts", "label", "image", "how it runs"])
def test_what_was_said_under_other_circumstances_is_not_taken_up(items, tmp_path, change):
    first, other = items[0], items[1]
    previous = describe_all([first], Scripted(), Gate(), work=tmp_path)
    config, gate, item = PromptedConfig(batch_size=4), Gate(), first
    if change == "setting":
        config = PromptedConfig(temperature=0.5)
    elif change == "how it runs":
        config = PromptedConfig(batch_size=2)
    elif change == "gate":
        gate = Gate(GateConfig(min_words=3))
    elif change == "facts":
        item = ImageToCaption(first.path, first.sha256, Facts(diagnosis=Diagnosis.NV, is_hairy=True), first.label)
    elif change == "label":
        item = ImageToCaption(first.path, first.sha256, first.facts, "something else")
    else:
        item = other
    captioner = Scripted(config=config)
    describe_all([item], captioner, gate, work=tmp_path, previous=previous)
    assert len(captioner.asked) == (0 if change == "how it runs" else 1)


def test_a_stand_in_is_todays_also_in_a_row_that_is_taken_up(items, tmp_path):
    empty = Scripted(lambda *_: Answer("", None))
    previous = describe_all(items[:2], empty, Gate(), work=tmp_path / "a")
    better = [dataclasses.replace(item, stand_in="a better sentence") for item in items[:2]]
    captioner = Scripted()
    table = describe_all(better, captioner, Gate(), work=tmp_path / "b", previous=previous)
    assert captioner.asked == []
    assert table["text"].to_pylist() == ["a better sentence"] * 2


def test_the_image_of_a_row_tells_its_class_and_what_is_known(tmp_path):
    row = {"modality": "endoscopic", "source_label": "unknown", "text": "An endoscopic image of polyps", "sex": "male"}
    item = ImageToCaption.of(tmp_path, "0" * 64, row, None, "endoscopic image")
    assert (item.label, item.stand_in, item.sha256) == ("polyps", "endoscopic image", "0" * 64)
    assert item.facts == Facts(Modality.ENDOSCOPIC, sex=Sex.MALE)
    assert ImageToCaption.of(tmp_path, "0" * 64, row | {"diagnosis": "nv"}).label == "melanocytic nevus"
    assert ImageToCaption.of(tmp_path, "0" * 64, {"source_label": "OTHER"}).label is None


def test_equal_images_are_asked_about_once(items, tmp_path):
    captioner = Scripted()
    table = describe_all([items[0], items[1], items[0]], captioner, Gate(), work=tmp_path)
    assert len(captioner.asked) == 2
    assert table.num_rows == 3
    assert table.slice(0, 1).equals(table.slice(2, 1))


def test_files_that_changed_or_broke_are_an_error_that_names_them(items, tmp_path):
    changed = ImageToCaption(items[0].path, items[1].sha256)
    with pytest.raises(ValueError, match=rf"{items[0].path.name}: its bytes are no longer those of its record"):
        describe_all([changed], Scripted(), Gate(), work=tmp_path)
    with pytest.raises(ValueError, match=r"gone\.png: the file is missing on disk"):
        describe_all([ImageToCaption(tmp_path / "gone.png", "0" * 64)], Scripted(), Gate(), work=tmp_path)


def test_tokens_are_counted_with_the_readers_tokenizer(items, tmp_path):
    gate = Gate(count_tokens=lambda text: len(text))
    table = describe_all(
        items[:4], Scripted(config=PromptedConfig()), Gate(GateConfig(max_tokens=5), len), work=tmp_path
    )
    assert table["num_tokens"].to_pylist() == [len(text) for text in table["text"].to_pylist()]
    assert set(table["verdict"].to_pylist()) == {"fallback"}
    assert gate.count_tokens("ab") == 2


def test_the_settings_of_every_captioner_are_told_apart_by_kind():
    read = TypeAdapter(CaptionerConfig).validate_python
    assert read({"kind": "descriptor", "num_spots": 3}) == DescriptorConfig(num_spots=3)
    assert read({"kind": "llava_next", "gate": {"max_tokens": 77}}).gate.max_tokens == 77
    assert read({"kind": "openai", "base_url": "http://127.0.0.1/v1", "model": "m"}).model == "m"
    for wrong in (
        {"kind": "other"},
        {"kind": "llava_next", "beams": 3},
        {"kind": "openai", "base_url": "x", "model": "m"},
    ):
        with pytest.raises(ValidationError):
            read(wrong)


def test_a_tiny_llava_next_captions_phantoms_through_the_real_path(items, tmp_path):
    folder = write_tiny_llava_next(tmp_path / "model")
    captioner = make_captioner(LlavaNextConfig(model=str(folder), max_new_tokens=12, batch_size=6, max_attempts=2))
    assert isinstance(captioner, LlavaNextCaptioner)
    table = describe_all(items, captioner, Gate(), work=tmp_path / "a")
    assert set(table["verdict"].to_pylist()) == {"fallback"}  # it knows nothing, and the gate notices
    assert table["attempts"].to_pylist() == [2] * 12
    assert all(table["raw_answer"].to_pylist())
    again = describe_all(items[::-1], captioner, Gate(), work=tmp_path / "b", batch_size=5)
    assert again.take(pa.array(range(11, -1, -1))).equals(table)


def test_a_killed_process_leaves_every_answer_but_those_of_one_batch(items, tmp_path):
    folder = write_tiny_llava_next(tmp_path / "model")
    script = f"""
        import os, signal, sys
        from pathlib import Path
        from derm_pipeline.captions.gate import Gate
        from derm_pipeline.captions.llava_next import LlavaNextCaptioner, LlavaNextConfig
        from derm_pipeline.captions.symptoms import ImageToCaption, describe_all

        class Dying(LlavaNextCaptioner):
            left = 2
            def answer(self, questions):
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.left -= 1
                return super().answer(questions)

        items = [ImageToCaption(Path(line.split()[0]), line.split()[1]) for line in sys.stdin]
        config = LlavaNextConfig(model={str(folder)!r}, max_new_tokens=8, batch_size=3, max_attempts=1)
        describe_all(items, Dying(config), Gate(), work=Path({str(tmp_path / "work")!r}))
    """
    lines = "\n".join(f"{item.path} {item.sha256}" for item in items)
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], input=lines, text=True, check=False, env=dict(os.environ)
    )
    assert killed.returncode == -signal.SIGKILL
    kept = [row for path in (tmp_path / "work").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert len(kept) == 6
    plain = [ImageToCaption(item.path, item.sha256) for item in items]
    captioner = LlavaNextCaptioner(LlavaNextConfig(model=str(folder), max_new_tokens=8, batch_size=3, max_attempts=1))
    asked = []
    answer = captioner.answer
    captioner.answer = lambda questions: asked.extend(question.seed for question in questions) or answer(questions)
    table = describe_all(plain, captioner, Gate(), work=tmp_path / "work")
    assert asked == seeds_of(items[6:])
    captioner.answer = answer
    assert table.equals(describe_all(plain, captioner, Gate(), work=tmp_path / "fresh"))
