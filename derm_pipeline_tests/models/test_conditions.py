import pytest
import torch

from derm_pipeline.models.conditions import (
    TextEmbedder,
    check_classes,
    condition_classes,
    draw_hidden,
    hide,
)
from derm_pipeline.models.dit import DiT, DiTConfig
from derm_pipeline.records import AgeBand, Diagnosis, Site

NAMES = ("diagnosis", "skin_type", "sex")


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_label_of_a_record_can_be_a_condition():
    classes = condition_classes(("diagnosis", "skin_type", "sex", "age_band", "site"), [Diagnosis.MEL, Diagnosis.NV])
    assert classes["diagnosis"] == ("mel", "nv")
    assert classes["skin_type"] == ("1", "2", "3", "4", "5", "6")
    assert classes["sex"] == ("female", "male")
    assert classes["age_band"] == ("0-29", "30-49", "50-69", "70+")
    assert len(classes["site"]) == len(Site)
    assert all(type(value) is str for values in classes.values() for value in values)
    with pytest.raises(ValueError, match="'colour'.*diagnosis, skin_type, sex, age_band, site"):
        condition_classes(("diagnosis", "colour"), [])


def test_age_bands_split_all_ages_in_years():
    assert [AgeBand.of(age) for age in (0, 29, 29.9, 30, 49, 50, 69, 70, 120)] == [
        *[AgeBand.TO_29] * 3,
        *[AgeBand.TO_49] * 2,
        *[AgeBand.TO_69] * 2,
        *[AgeBand.FROM_70] * 2,
    ]
    assert AgeBand.of_range("30-39") == "30-49"
    assert AgeBand.of_range("40-55") is None
    for age in (-1, 201, float("nan")):
        with pytest.raises(ValueError, match="0 to 200"):
            AgeBand.of(age)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"diagnosis": torch.tensor([0, 7, 8, 9])}, "diagnosis is 8 in row 2 .*1 more.*0 to 6.* 7 is its null class"),
        ({"diagnosis": torch.tensor([0, -1])}, "diagnosis is -1 in row 1"),
        ({"sex": torch.tensor([0])}, "nothing is told of diagnosis; .* null class, 7"),
        ({"diagnosis": torch.tensor([0.5])}, "float32"),
        ({"diagnosis": torch.tensor([[1]])}, r"\(1, 1\)"),
    ],
)
def test_classes_out_of_range_are_refused_by_name_and_row(told, message):
    with pytest.raises(ValueError, match=message):
        check_classes(told, {"diagnosis": 7})
    check_classes({"diagnosis": torch.tensor([0, 6, 7])}, {"diagnosis": 7})


def test_hiding_all_together_draws_as_it_always_did():
    hidden = draw_hidden(NAMES, 50, stream(), together=0.3)
    expected = torch.rand(50, generator=stream()) < 0.3
    assert all(torch.equal(rows, expected) for rows in hidden.values())
    one, other = stream(1), stream(1)
    draw_hidden(NAMES, 50, one, together=0.3)
    torch.rand(50, generator=other)
    assert torch.equal(torch.rand(5, generator=one), torch.rand(5, generator=other)), "nothing more was drawn"


def test_conditions_are_hidden_as_often_as_asked_each_by_itself():
    num = 40_000
    hidden = draw_hidden(NAMES, num, stream(), together=0.1, each={"skin_type": 0.2, "sex": 0.5})
    rates = {name: float(rows.float().mean()) for name, rows in hidden.items()}
    assert rates == pytest.approx({"diagnosis": 0.1, "skin_type": 1 - 0.9 * 0.8, "sex": 1 - 0.9 * 0.5}, abs=0.015)
    both = float((hidden["skin_type"] & hidden["sex"] & ~hidden["diagnosis"]).float().mean())
    assert both == pytest.approx(0.9 * 0.2 * 0.5, abs=0.01)
    assert (hidden["skin_type"] | ~hidden["diagnosis"]).all(), "what hides all hides each"
    with pytest.raises(ValueError, match="'site' cannot be hidden"):
        draw_hidden(NAMES, 3, stream(), together=0.1, each={"site": 0.2})


def test_hidden_rows_are_told_the_null_and_the_others_what_they_were():
    config = DiTConfig(
        latent_size=4, width=16, depth=1, heads=2, conditions={"diagnosis": 7, "sex": 2}, text_tokens=3, text_width=5
    )
    model = DiT(config)
    told = {
        "diagnosis": torch.tensor([1, 2, 3]),
        "sex": torch.tensor([0, 1, 0]),
        "text": torch.randn(3, 3, 5),
        "text_mask": torch.ones(3, 3, dtype=torch.bool),
    }
    hidden = {"sex": torch.tensor([True, False, False]), "text": torch.tensor([False, False, True])}
    result = hide(told, model.null_conditions(3), hidden)
    assert result["diagnosis"].tolist() == [1, 2, 3]
    assert result["sex"].tolist() == [2, 1, 0]
    assert result["text_mask"].any(1).tolist() == [True, True, False]
    assert torch.equal(result["text"][:2], told["text"][:2])
    assert told["sex"].tolist() == [0, 1, 0], "what was told is not changed"
    with pytest.raises(ValueError, match="'site' cannot be hidden"):
        hide(told, model.null_conditions(3), {"site": hidden["sex"]})


def test_text_is_pooled_by_attention_as_written_out():
    torch.manual_seed(0)
    embedder = TextEmbedder(5, 16, heads=2, init_std=0.3).double()
    text, mask = torch.randn(4, 6, 5, dtype=torch.float64), torch.rand(4, 6) < 0.5
    mask[:, 0] = True
    pooled, tokens, there = embedder(text, mask)
    assert torch.equal(there, mask)
    for row in range(4):
        words = text[row][mask[row]]
        normal = (words - words.mean(1, keepdim=True)) / torch.sqrt(words.var(1, unbiased=False, keepdim=True) + 1e-5)
        features = normal @ embedder.proj.weight.T + embedder.proj.bias
        torch.testing.assert_close(tokens[row][mask[row]], features)
        keys, values = (features @ embedder.kv.weight.T + embedder.kv.bias).split(16, dim=1)
        heads = []
        for part in (slice(0, 8), slice(8, 16)):
            weights = torch.softmax(keys[:, part] @ embedder.query[part] / 8**0.5, dim=0)
            heads.append(weights @ values[:, part])
        vector = torch.cat(heads)
        expected = 0.3 * (vector - vector.mean()) / torch.sqrt(vector.var(unbiased=False) + 1e-5)
        torch.testing.assert_close(pooled[row], expected)
