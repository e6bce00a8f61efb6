"""Embeddings of texts: each distinct text once, found by its words, resumable, reused of the same encoder only."""

import hashlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from derm_pipeline.latents import open_embeddings, write_embeddings

ENCODER = {"files": {"config.json": "a" * 64}, "max_tokens": 5}


class Encoder:
    """Any tensors, each row a function of its text; keeps what it was asked for."""

    def __init__(self, scale=1.0):
        self.asked, self.scale = [], scale

    def __call__(self, texts):
        self.asked.append(list(texts))
        rows = [
            torch.from_numpy(np.frombuffer(hashlib.sha256(one.encode()).digest(), np.uint8).copy()) for one in texts
        ]
        values = torch.stack(rows).float() / 7 * self.scale
        return {
            "text": values[:, :30].view(-1, 5, 6),
            "text_mask": torch.arange(5) < torch.tensor([1 + len(one) % 5 for one in texts])[:, None],
            "pooled": values[:, :4],
        }


def texts_of(num, seed=None):
    numbers = np.random.default_rng(seed).integers(0, 10**9, num)
    return [f"an image of melanoma, {number}" for number in numbers]


def same(found, texts, scale=1.0):
    """Whether the rows of these texts are what an encoder gives, in half."""
    expected = Encoder(scale)(texts)
    rows = found.gather(found.rows_of(texts))
    return all(
        torch.equal(rows[name], tensor.half() if tensor.is_floating_point() else tensor)
        for name, tensor in expected.items()
    )


def test_every_distinct_text_is_embedded_once_and_the_empty_one_always(tmp_path):
    texts, encoder = texts_of(23), Encoder()
    seen = []
    write_embeddings(
        tmp_path,
        [*texts, *texts[::-1]],
        encoder,
        encoder=ENCODER,
        shard_size=10,
        on_progress=lambda *at: seen.append(at),
    )
    found = open_embeddings(tmp_path)
    assert [len(batch) for batch in encoder.asked] == [10, 10, 4]
    assert sorted(sum(encoder.asked, [])) == sorted({"", *texts})
    assert seen == [(10, 24), (20, 24), (24, 24)]
    assert len(found) == 24
    assert same(found, [texts[11], "", texts[11], *texts])
    assert found.encoder == ENCODER
    assert found.shapes == {"text": (5, 6), "text_mask": (5,), "pooled": (4,)}
    assert found.num_bytes == 24 * (2 * 30 + 5 + 2 * 4)
    index = pq.read_table(tmp_path / "index.parquet")["sha256"].to_pylist()
    assert index == [hashlib.sha256(text.encode()).hexdigest() for text in ["", *texts]]


def test_the_same_texts_give_the_same_bytes_in_as_many_pieces_as_they_come(tmp_path):
    texts = texts_of(9)
    for name in ("a", "b"):
        write_embeddings(tmp_path / name, (text for text in texts), Encoder(), encoder=ENCODER, shard_size=4)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_text_that_is_not_there_is_named_and_rows_are_checked(tmp_path):
    write_embeddings(tmp_path, ["a nevus"], Encoder(), encoder=ENCODER)
    found = open_embeddings(tmp_path)
    assert "a nevus" in found
    assert "a mole" not in found
    with pytest.raises(ValueError, match="'a mole' has no embedding"):
        found.rows_of(["a nevus", "a mole"])
    for rows in ([2], [-1]):
        with pytest.raises(IndexError, match="there are 0 to 1"):
            found.gather(rows)


def test_rows_of_the_same_encoder_are_taken_over_in_any_order_and_of_another_are_not(tmp_path):
    old, new = texts_of(20), texts_of(5)
    write_embeddings(tmp_path / "old", old, Encoder(scale=2), encoder=ENCODER, shard_size=7)
    mixed = [*new[:2], *old[15:3:-1], *new[2:]]
    encoder = Encoder()
    options = {"previous": tmp_path / "old", "shard_size": 6}
    num = write_embeddings(tmp_path / "new", mixed, encoder, encoder=ENCODER, **options)
    assert num == 12 + 1
    assert sorted(sum(encoder.asked, [])) == sorted(new)
    found = open_embeddings(tmp_path / "new")
    assert same(found, new)
    assert same(found, [*old[4:16], ""], scale=2)  # as they were: nobody asked again
    other = Encoder()
    assert write_embeddings(tmp_path / "other", mixed, other, encoder=ENCODER | {"max_tokens": 6}, **options) == 0
    assert len(sum(other.asked, [])) == len(mixed) + 1
    assert write_embeddings(tmp_path / "none", mixed, Encoder(), encoder=ENCODER, previous=tmp_path / "nowhere") == 0


def test_an_interrupted_writing_loses_one_shard_at_most(tmp_path):
    texts, encoder = texts_of(17), Encoder()

    def fails(wanted):
        if len(encoder.asked) == 2:
            raise KeyboardInterrupt
        return encoder(wanted)

    with pytest.raises(KeyboardInterrupt):
        write_embeddings(tmp_path, texts, fails, encoder=ENCODER, shard_size=6)
    again = Encoder()
    write_embeddings(tmp_path, texts, again, encoder=ENCODER, shard_size=6)
    assert again.asked == [texts[11:]]
    assert same(open_embeddings(tmp_path), texts)


def test_shards_of_other_texts_are_not_taken(tmp_path):
    write_embeddings(tmp_path, texts_of(3), Encoder(), encoder=ENCODER)
    with pytest.raises(ValueError, match="embeddings of other texts or of another encoder"):
        write_embeddings(tmp_path, texts_of(3), Encoder(), encoder=ENCODER)


def test_values_that_float16_cannot_hold_are_refused_with_their_text(tmp_path):
    for value in (7e4, float("nan"), float("-inf")):

        def embed(texts, value=value):
            return {"text": torch.tensor([[value if "large" in text else 0.0] for text in texts])}

        with pytest.raises(ValueError, match="of the text 'a large nevus' is .*float16 cannot hold"):
            write_embeddings(tmp_path, ["a nevus", "a large nevus"], embed, encoder=ENCODER)
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_encoder_that_changes_its_mind_is_refused(tmp_path):
    widths = iter([3, 4])
    with pytest.raises(ValueError, match="not of one encoder"):
        write_embeddings(
            tmp_path / "a",
            texts_of(3),
            lambda texts: {"text": torch.zeros(len(texts), next(widths))},
            encoder=ENCODER,
            shard_size=2,
        )
    with pytest.raises(ValueError, match="gave 1 rows of 'text' for 4 texts"):
        write_embeddings(tmp_path / "b", texts_of(3), lambda _: {"text": torch.zeros(1, 3)}, encoder=ENCODER)


def test_a_damaged_or_missing_shard_is_named(tmp_path):
    write_embeddings(tmp_path, texts_of(3), Encoder(), encoder=ENCODER, shard_size=2)
    first, second = sorted(tmp_path.glob("texts-*.safetensors"))
    second.write_bytes(second.read_bytes()[:40])
    with pytest.raises(ValueError, match="texts-00001.safetensors is damaged"):
        open_embeddings(tmp_path)
    second.unlink()
    with pytest.raises(ValueError, match="texts-00001.safetensors is missing"):
        open_embeddings(tmp_path)
