"""What went in: labels, doubles, a model's captions and how right the descriptor's words are."""

from html import unescape

from derm_pipeline.evaluation.report_content import AttributeAccuracy, ReportContent
from derm_pipeline.evaluation.report_data import data_section

EVIL = "<script>alert(1)</script> & \"'"


def words(**content) -> str:
    return unescape(str(data_section(ReportContent("r", "t", 8, **content), 128))).replace("\xa0", " ")


def test_labels_are_shown_with_what_they_mean_and_those_that_mean_nothing():
    text = words(
        labels=[
            {"source": "D7P", "source_label": "clark nevus", "diagnosis": "nv", "num_images": 1234},
            {"source": "D7P", "source_label": "melanosis", "diagnosis": None, "num_images": 3},
            {"source": "D7P", "source_label": "", "diagnosis": None, "num_images": 1},
        ]
    )
    assert "the sources' 3 labels" in text
    assert 'clark nevus</td><td>nv</td><td class="num">1,234' in text
    assert "melanosis</td><td>none" in text
    assert "no label" in text


def test_many_labels_are_cut_short_and_counted():
    labels = [{"source": "s", "source_label": f"l{n}", "diagnosis": "nv", "num_images": 1} for n in range(75)]
    assert "and 15 more" in words(labels=labels)


def test_images_that_are_not_learned_from_are_counted_with_the_reason():
    text = words(
        left_out_of_training={"no diagnosis": 12, "another diagnosis": 0, "double": 88},
        joined={"archive_id": 86, "digest": 43, "other_diagnosis": 1},
    )
    assert "12 for no diagnosis; 88 for double" in text
    assert "86 by the name that an archive gave, 43 by the same bytes; 1 of them carry another diagnosis" in text
    assert "not used" not in words(left_out_of_training={"double": 0}, joined={})


def test_a_models_captions_are_counted_by_verdict():
    text = words(caption_verdicts={"accepted": 45, "fallback": 5})
    assert "n = 50 images: 45 accepted, 5 fallback" in text
    assert "A model was asked" not in words()


def test_the_descriptors_words_are_shown_with_n_interval_and_the_guess_they_must_beat():
    rows = [
        AttributeAccuracy("border", 600, 0.91, 0.885, 0.93, 0.88, 0.7),
        AttributeAccuracy("x", 2, 1, 0.3, 1, None, 1),
    ]
    text = words(caption_accuracy=rows)
    assert "91.0 % [88.5 %, 93.0 %]" in text
    assert "600" in text
    assert "border" in text


def test_what_a_source_says_cannot_become_markup():
    labels = [{"source": EVIL, "source_label": EVIL, "diagnosis": None, "num_images": 1}]
    raw = str(data_section(ReportContent("r", "t", 8, labels=labels, caption_verdicts={EVIL: 2}), 128))
    assert "<script" not in raw
