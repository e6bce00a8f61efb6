from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from derm_pipeline.evaluation.bootstrap import wilson_interval
from derm_pipeline.evaluation.fidelity import FeatureSet, FidelityConfig, compare, fidelity_table
from derm_pipeline.evaluation.groups import GroupConfig, group_metrics
from derm_pipeline.evaluation.markup import Markup, element, number, percent, points, table
from derm_pipeline.evaluation.plots import (
    Mark,
    Row,
    Scale,
    dot_plot,
    gain_scale,
    loss_chart,
    nice,
    share_scale,
    smoothed,
)
from derm_pipeline.evaluation.report import (
    MAX_BYTES,
    CaptionExample,
    ComparisonRow,
    HairExamples,
    LossCurve,
    NearestPair,
    Reconstructions,
    ReportContent,
    SampleGrid,
    loss_curve_picture,
    render_leaderboard,
    render_report,
)
from derm_pipeline.images import decode
from derm_pipeline.records import Diagnosis
from derm_pipeline.sources.phantom.drawing import PhantomConfig, draw, plan

EVIL = "<script>document.title='run'</script><img src=x onerror=alert(1)>\"'&"
CODES = [diagnosis.value for diagnosis in tuple(Diagnosis)[:7]]


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, the text, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def content() -> ReportContent:
    rng = np.random.default_rng()
    cases = plan(PhantomConfig(num_images=400, seed=int(rng.integers(1000))))
    images = np.stack([draw(case, 48, 48).image for case in cases[:12]])
    rows = []
    for arm, skill in (("real", 1.0), ("real+synthetic", 2.0), ("synthetic", 0.5)):
        for seed in range(2):
            for case in cases:
                scores = np.exp(rng.normal(size=7) + skill * np.eye(7)[CODES.index(case.diagnosis)])
                rows.append(
                    {
                        "image_id": case.image_id,
                        "lesion_id": case.lesion_id,
                        "diagnosis": case.diagnosis.value,
                        "skin_tone": case.skin_type.tone,
                        "sex": case.sex,
                        "arm": arm,
                        "seed": seed,
                        "predicted": CODES[int(scores.argmax())],
                        **{f"p_{code}": p for code, p in zip(CODES, scores / scores.sum(), strict=True)},
                    }
                )
    found = group_metrics(pd.DataFrame(rows), GroupConfig(num_bootstrap=100))
    labels = [case.diagnosis.value for case in cases]
    scores = fidelity_table(
        compare(
            FeatureSet(rng.normal(size=(400, 16)) + 0.3, labels),
            FeatureSet(rng.normal(size=(400, 16)), labels, [case.lesion_id for case in cases]),
            "classifier",
            FidelityConfig(num_repeats=3),
        )
    )
    raw = {"reference": "raw_images/phantom/aa", "content_digest": "ab" * 32, "inputs": {}}
    records = {"reference": "records/phantom/bb", "content_digest": "cd" * 32, "inputs": {"raw_images": raw}}
    root = {
        "reference": "group_metrics/r/cc",
        "content_digest": "ef" * 32,
        "inputs": {"one": records, "two": records},
    }
    steps = np.arange(1, 301)
    return ReportContent(
        recipe="quickstart",
        title="Drawn lesions",
        size_px=48,
        sources=[
            {
                "name": "phantom",
                "licence": "CC0",
                "num_records": 400,
                "num_quarantined": 1,
                "num_lesions": 310,
                "diagnoses": {code: labels.count(code) for code in CODES},
            }
        ],
        quarantined=[{"source": "phantom", "image_id": "p_1", "file": "a/b.jpg", "reason": "the file is empty"}],
        split_counts={"train": {"nv": 1234, "mel": 100}, "test": {"nv": 300, "mel": 100}},
        hair=HairExamples(images, images[:, ::-1], 0.25, 400),
        captions=[CaptionExample(images[0], "a nevus on the back", None)],
        reconstructions=Reconstructions(images, images, 27.25, 400),
        comparison=[ComparisonRow(code, images[:6], ["I"] * 6, images[6:], ["VI"] * 6) for code in CODES],
        losses={
            "autoencoder": LossCurve(steps, 1 / steps),
            "generator": LossCurve(
                steps, 1 + 0.1 * np.sin(steps), np.array([100, 200, 300]), np.array([1.1, 1, 1.2]), 77
            ),
        },
        grids=[SampleGrid(step, np.concatenate(images[:7])) for step in (100, 200, 300)],
        grid_rows=CODES,
        agreement={"all": 0.8, "mel": 0.6},
        num_samples={"all": 700, "mel": 100},
        num_agreement_seeds=2,
        fidelity=scores,
        copies={
            "num_copies": 9,
            "num_samples": 700,
            "num_train": 1800,
            "num_held_out": 400,
            "copy_rate": 0.0129,
            "held_out_rate": 0.01,
            "p_value": 0.4,
            "beyond_chance": False,
            "reason": None,
        },
        nearest_pairs=[NearestPair(images[0], images[1], 0.93, "sample_000", "p_7", is_copy=True)],
        overall=found.overall,
        groups=found.groups,
        worst=found.worst,
        gains=found.gains,
        left_out=found.left_out,
        lineage=root,
        settings={"name": "quickstart", "generator": {"width": 192}},
        libraries={"numpy": "2.2.0"},
    )


# --- The whole page -----------------------------------------------------------------------------------------------


def test_the_same_content_gives_the_same_bytes_in_another_process_too(content):
    assert render_report(content) == render_report(content)
    code = (
        "import numpy as np, hashlib\n"
        "from derm_pipeline.evaluation.report import *\n"
        "c = ReportContent('r', 't', 8, losses={'g': LossCurve(np.arange(9), np.arange(9) + 1.0)},"
        " settings={'b': 1, 'a': {'x': [1, 2]}})\n"
        "print(hashlib.sha256(render_report(c).encode()).hexdigest())"
    )
    digests = {
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1


def test_the_page_is_well_formed_and_loads_and_runs_nothing(content):
    text = render_report(content)
    page = Page(text)
    assert not page.open
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:image/", "#"))
    assert "http" not in re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]*|http-equiv", "", text)
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert "default-src 'none'" in policy
    assert "script-src 'none'" in policy


def test_every_link_of_the_navigation_leads_to_a_section(content):
    page = Page(render_report(content))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {link["href"] for link in page.all("a")}
    assert links == {f"#{key}" for key in ids}


def test_nothing_from_data_becomes_markup(content):
    evil = replace(
        content,
        recipe=EVIL,
        title=EVIL,
        sources=[{"name": EVIL, "licence": EVIL, "num_records": 1, "diagnoses": {EVIL: 1}}],
        quarantined=[{"source": EVIL, "image_id": EVIL, "file": EVIL, "reason": EVIL}],
        split_counts={EVIL: {EVIL: 1}},
        captions=[CaptionExample(content.captions[0].image, EVIL, EVIL)],
        comparison=[replace(content.comparison[0], diagnosis=EVIL, real_labels=[EVIL] * 6, sample_labels=[EVIL] * 6)],
        losses={EVIL: content.losses["autoencoder"]},
        grid_rows=[EVIL],
        agreement={"all": 0.5, EVIL: 0.5},
        num_samples={"all": 5, EVIL: 5},
        fidelity=content.fidelity.assign(group=EVIL, extractor=EVIL, reason=EVIL),
        copies={"num_copies": None, "reason": EVIL},
        nearest_pairs=[replace(content.nearest_pairs[0], sample_label=EVIL, nearest_label=EVIL)],
        overall=content.overall.assign(arm=EVIL, metric=EVIL, classes=EVIL),
        groups=content.groups.assign(arm=EVIL, group=EVIL, axis=EVIL, metric=EVIL),
        worst=content.worst.assign(arm=EVIL, group=EVIL, axis=EVIL, metric=EVIL),
        gains=content.gains.assign(arm=EVIL, worst_group=EVIL, baseline_worst_group=EVIL, baseline=EVIL),
        left_out=content.left_out.assign(axis=EVIL),
        lineage={"reference": EVIL, "content_digest": EVIL, "inputs": {EVIL: {"reference": EVIL}}},
        settings={EVIL: {EVIL: EVIL}},
        libraries={EVIL: EVIL},
    )
    text = render_report(evil)
    page = Page(text)
    assert not page.open
    assert not page.all("script")
    assert "<script" not in text
    assert not [image for image in page.all("img") if not (image["src"] or "").startswith("data:image/")]
    assert not [1 for _, attributes in page.elements if "onerror" in attributes]
    assert page.words.count("document.title='run'") > 30  # it is shown, as text


def test_an_empty_content_says_what_is_missing():
    page = Page(render_report(ReportContent("r", "t", 64)))
    assert not page.open
    for part in ("Sources", "Splits", "Loss curves", "Samples", "Agreement", "Fidelity", "Copies", "Groups", "Lineage"):
        assert f"{part}: not made in this run." in page.words


def test_pictures_shrink_until_the_page_is_small_enough(content):
    rng = np.random.default_rng()
    noise = rng.integers(0, 256, (14, 256, 256, 3), dtype=np.uint8)
    rows = [ComparisonRow(code, noise[:8], ["I"] * 8, noise[:8], ["I"] * 8) for code in CODES]
    heavy = replace(content, comparison=rows, hair=HairExamples(noise, noise, 0.5, 9))
    assert 1_000_000 < len(render_report(heavy).encode()) <= MAX_BYTES


# --- What it says -------------------------------------------------------------------------------------------------


def test_the_headline_gives_the_worst_group_before_and_after_and_the_paired_gain(content):
    words = Page(render_report(content)).words
    worst = content.worst[content.worst.axis == "skin_tone"].set_index("arm")
    gain = content.gains[
        (content.gains.axis == "skin_tone") & (content.gains.group == "worst") & (content.gains.arm == "real+synthetic")
    ].iloc[0]
    before, after = worst.group_min["real"], worst.group_min["real+synthetic"]
    assert f"{percent(before)} → {percent(after)}".replace("\u00a0", " ") in words
    assert f"{points(gain.gain)} points [{points(gain.low)}, {points(gain.high)}], n = {gain.n:,}, paired" in words


def test_every_arm_and_group_is_in_the_tables_with_its_n(content):
    text = render_report(content)
    for row in content.groups.itertuples():
        low_high = "no interval" if np.isnan(row.low) else f"[{100 * row.low:.1f}, {100 * row.high:.1f}]"
        known = [row.group.replace(" x ", " × "), row.metric, percent(row.value), low_high]
        cells = "".join(rf"<td[^>]*>{re.escape(cell)}</td>" for cell in known)
        axis, law = "<td[^>]*>[^<]*</td>", "<td[^>]*>[a-z]*</td>"
        assert re.search(rf"<td>{re.escape(row.arm)}</td>{axis}{cells}{law}<td[^>]*>{row.n}</td>", text), known


def test_small_groups_are_hollow_and_others_are_not(content):
    assert set(content.groups.eligible) == {True, False}
    assert render_report(content).count('class="hollow"') == int((~content.groups.eligible).sum())
    text = Page(render_report(replace(content, groups=content.groups.assign(eligible=True)))).elements
    assert not [1 for _, attributes in text if attributes.get("class") == "hollow"]


def test_a_refused_figure_shows_its_reason_and_no_number(content):
    refused = content.fidelity[content.fidelity.value.isna()]
    assert len(refused)
    words = Page(render_report(content)).words
    for row in refused.itertuples():
        assert f"{row.group} : {row.reason}" in words
    none = content.fidelity.assign(value=np.nan, low=np.nan, high=np.nan, floor=np.nan, reason="too few by far")
    assert "no figure too few by far" in Page(render_report(replace(content, fidelity=none))).words


def test_copies_beyond_chance_are_said_to_be(content):
    sentence = "more than chance explains"
    assert f"no {sentence}" in Page(render_report(content)).words
    many = replace(content, copies={**content.copies, "beyond_chance": True})
    words = Page(render_report(many)).words
    assert sentence in words
    assert f"no {sentence}" not in words
    none = replace(content, copies={"num_copies": None, "reason": "3 samples and 4 held-out images"})
    assert "No verdict: 3 samples and 4 held-out images." in Page(render_report(none)).words


def test_phantoms_are_said_to_be_drawn_and_photographs_are_not(content):
    assert "drawn images" in Page(render_report(content)).words
    photographs = replace(content, sources=[{**content.sources[0], "name": "ham10000"}])
    words = Page(render_report(photographs)).words
    assert "drawn images" not in words
    assert "not for diagnosis" in words


def test_no_metric_is_called_fid_but_those_of_inception(content):
    assert "No metric here is called FID" in Page(render_report(content)).words
    inception = content.fidelity.assign(extractor="inception")
    assert "No metric here is called FID" not in Page(render_report(replace(content, fidelity=inception))).words


def test_small_pictures_arrive_as_they_are(content):
    sources = [image["src"] for image in Page(render_report(content)).all("img")]
    pixels = {decode(base64.b64decode(source.split(",")[1])).tobytes() for source in sources if "png" in source}
    assert content.captions[0].image.tobytes() in pixels


def test_lineage_opens_a_shared_artifact_once(content):
    words = Page(render_report(content)).words
    section = words[words.index("Which artifact was made") :]
    assert section.count("records/phantom/bb") == 2
    assert section.count("raw_images/phantom/aa") == 1
    assert section.count("opened above") == 1


# --- Leaderboard --------------------------------------------------------------------------------------------------


def figure(value, **more):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 321} | more


def test_the_leaderboard_has_a_row_a_recipe_and_its_keys_sort_as_the_figures_do():
    values = np.random.default_rng().permutation(5) / 10 + 0.2
    rows = [
        {
            "recipe": f"r{index}",
            "sources": ["phantom"],
            "num_samples": 700,
            "agreement": value,
            "fidelity": {"fd_classifier": figure(value, floor=0.1)},
            "balanced_accuracy": {"real": figure(value)},
            "worst": {"real": figure(value, axis="skin_tone", group="dark")},
            "gain": figure(value - 0.4, axis="skin_tone"),
        }
        for index, value in enumerate(values)
    ]
    page = Page(render_leaderboard(rows))
    assert not page.open
    cells = [cell["data-key"] for cell in page.all("td")]
    width = len(page.all("th"))
    assert len(cells) == width * len(rows)
    keys = np.array(cells).reshape(len(rows), width)
    assert sum(list(column) == [str(value) for value in values] for column in keys.T) == 4
    assert page.words.count("n = 321") == 4 * len(rows)


def test_the_leaderboards_only_script_is_the_one_that_its_policy_names():
    text = render_leaderboard([{"recipe": EVIL, "title": EVIL, "sources": [EVIL], "worst": {EVIL: figure(0.1)}}])
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == len(re.findall("<script", text)) == 1
    assert f"script-src 'sha256-{digest}'" in text
    assert "document.title" not in scripts[0]


def test_a_recipe_without_figures_has_dashes_and_reasons():
    row = {"recipe": "new", "fidelity": {"fd_classifier": {"value": None, "reason": "63 images a side"}}}
    words = Page(render_leaderboard([row])).words
    assert "no figure 63 images a side" in words
    assert "No recipe has a report yet." in Page(render_leaderboard([])).words


# --- Parts --------------------------------------------------------------------------------------------------------


@given(st.text())
def test_text_comes_back_from_an_element_as_it_was(text):
    class Reader(HTMLParser):
        seen = ""
        value: str | None = ""

        def handle_starttag(self, tag, attrs):
            self.value = dict(attrs)["title"]

        def handle_data(self, data):
            self.seen += data

    reader = Reader()
    reader.feed(element("p", text, title=text))
    reader.close()
    assert reader.seen == text
    assert reader.value == text


def test_only_markup_enters_an_element_as_it_is():
    assert element("p", "<b>", Markup("<b></b>"), None, 3, ["&"]) == "<p>&lt;b&gt;<b></b>3&amp;</p>"


def test_numbers_in_words():
    assert [number(value) for value in (12345, 0.00012345, -1.5, None, float("nan"), np.int64(7), True)] == [
        "12,345",
        "0.000123",
        "\u22121.5",
        "–",
        "–",
        "7",
        "yes",
    ]
    assert percent(0.1234) == "12.3\u00a0%"
    assert points(-0.051) == "\u22125.1"


def test_numbers_stand_right_and_words_left():
    page = Page(table(["a", "b", "c"], [["x", 3, "[0.1, 0.2]"], ["nv", None, "12.5\u00a0%"], ["2 of them", 4, "–"]]))
    assert [cell.get("class") for cell in page.all("th")] == [None, "num", "num"]


@given(st.floats(1e-6, 1e6))
def test_nice_numbers_are_the_next_above(value):
    found = nice(value)
    assert value * (1 - 1e-6) <= found <= 2 * value * (1 + 1e-6)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9))
def test_gains_fit_their_scale_and_zero_is_in_the_middle(values):
    scale = gain_scale(values)
    assert scale.at(0) == 50
    assert scale.low <= min(values)
    assert max(values) <= scale.high


def test_a_mark_lies_where_its_value_is():
    plot = dot_plot([Row("a", "b", [Mark(0.25, 0.125, 0.5, "real", "words")], (0, 0.1, 0.2))], Scale(0, 1), label="l")
    page = Page(plot)
    (whisker,) = [line for line in page.all("line") if line.get("class") == "whisker"]
    assert (whisker["x1"], whisker["x2"]) == ("12.5%", "50.0%")
    assert [drawing["x"] for drawing in page.all("svg") if "x" in drawing] == ["25.0%"]


def test_smoothing_keeps_lines_and_their_length():
    length = int(np.random.default_rng().integers(1, 500))
    line = np.linspace(0, 1, length)
    half = length // 80
    np.testing.assert_allclose(smoothed(line)[half : length - half], line[half : length - half], atol=1e-9)
    flat = np.full(length, 0.3)
    np.testing.assert_allclose(smoothed(flat), flat)


@pytest.mark.parametrize("losses", [[1.0], [0.0, 0.0], np.geomspace(1, 1e-6, 5000), np.linspace(-3, 3, 777)])
def test_any_finite_loss_can_be_drawn(losses):
    losses = np.asarray(losses)
    chart = loss_chart(np.arange(len(losses)), losses, label="l")
    numbers = [float(x) for path in Page(chart).all("path") for x in re.findall(r"-?[\d.]+", path["d"])]
    assert min(numbers) >= 0
    assert max(numbers) <= 100
    assert len(chart) < 40_000


def test_losses_that_are_not_finite_leave_the_rest(content):
    losses = np.array([1.0, np.nan, 0.5, np.inf])
    text = render_report(replace(content, losses={"generator": LossCurve(np.arange(4), losses)}))
    assert "generator: loss, n = 4 steps" in text
    assert not [path for path in re.findall(r' d="([^"]*)"', text) if "nan" in path or "inf" in path]
    gone = replace(content, losses={"generator": LossCurve(np.arange(1), np.array([np.nan]))})
    assert "generator: no loss is finite." in render_report(gone)


def test_losses_on_val_images_are_drawn_beside_the_others_and_always_fit(content):
    steps, losses = np.arange(1, 101), np.geomspace(1, 0.01, 100)
    plain = loss_chart(steps, losses, label="l")
    assert "s-synthetic" not in plain
    for measured in ([0.9, 0.5, 30.0], [0.9, 0.5, -1.0], [0.5]):  # far above, not for logarithms, one alone
        at = np.linspace(10, 100, len(measured)).astype(int)
        page = Page(loss_chart(steps, losses, label="l", validation=(at, np.array(measured))))
        paths = [path["d"] for path in page.all("path") if "s-synthetic" in path["class"]]
        assert len(paths) == 2
        places = np.array(re.findall(r"[ML]?([\d.]+) ([\d.]+)h0", paths[1]), float)
        assert len(places) == len(measured)
        assert (places >= 0).all()
        assert (places <= 100).all()
        order = np.argsort(measured)
        assert (np.diff(places[order, 1]) < 0).all()  # a higher loss stands higher
        assert places[-1, 0] == pytest.approx(100 * (at[-1] - 1) / 99, abs=0.01)
    text = Page(render_report(content)).words
    assert "validation, n = 77 images" in text
    assert "nothing chosen by them" in text
    alone = {"generator": replace(content.losses["generator"], validation_losses=np.full(3, np.nan))}
    assert "s-synthetic curve" not in render_report(replace(content, losses=alone))


def test_samples_on_the_way_are_shown_with_their_steps_and_diagnoses(content):
    page = Page(render_report(content))
    shown = [image for image in page.all("img") if (image["alt"] or "").startswith("samples after step")]
    assert [image["alt"] for image in shown] == [f"samples after step {n}: {', '.join(CODES)}" for n in (100, 200, 300)]
    assert all(int(image["height"]) > 7 * 40 for image in shown)
    assert "Samples on the way" in page.words
    assert "Samples on the way" not in render_report(replace(content, grids=[]))


def test_the_loss_picture_is_rgb_and_shows_the_curve():
    steps = np.arange(1, 1000)
    falling = loss_curve_picture(steps, np.exp(-steps / 100) + 0.01, "generator $x_")
    assert falling.shape == (320, 640, 3)
    assert falling.dtype == np.uint8
    assert (falling == loss_curve_picture(steps, np.exp(-steps / 100) + 0.01, "generator $x_")).all()
    rising = loss_curve_picture(steps, np.exp(steps / 100) + 0.01, "generator $x_")
    blue = [np.argwhere((picture == (0, 114, 178)).all(axis=-1)) for picture in (falling, rising)]
    slopes = [np.polyfit(found[:, 1], found[:, 0], 1)[0] for found in blue]
    assert slopes[0] > 0 > slopes[1]  # rows count downwards


def test_the_loss_picture_shows_losses_on_val_images():
    steps = np.arange(1, 101)
    plain = loss_curve_picture(steps, 1 / steps, "generator")
    beside = loss_curve_picture(steps, 1 / steps, "generator", validation=(np.array([50, 100]), np.array([0.5, 0.4])))
    assert plain.shape == beside.shape
    orange = (np.abs(beside.astype(int) - (0xD5, 0x5E, 0x00)).max(2) < 20).sum()
    assert orange > 50
    assert (np.abs(plain.astype(int) - (0xD5, 0x5E, 0x00)).max(2) < 20).sum() == 0


def test_a_loss_picture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 steps and 0 losses"):
        loss_curve_picture(np.arange(0), np.zeros(0), "generator")


def test_wilson_intervals_are_those_of_the_textbook():
    from scipy.stats import binomtest

    n = int(np.random.default_rng().integers(5, 900))
    for right in (0, n // 3, n):
        expected = binomtest(right, n).proportion_ci(0.9, method="wilson")
        np.testing.assert_allclose(wilson_interval(right / n, n, 0.9), expected, atol=1e-9)


def test_matplotlib_and_pandas_come_only_when_needed():
    code = (
        "import sys, derm_pipeline.evaluation.report\n"
        "print([name for name in ('torch', 'matplotlib', 'pandas', 'dagster') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_groups_too_small_to_be_judged_are_named_in_the_headline(content):
    words = Page(render_report(content)).words
    assert ("not judged, too few images" in words) == bool(
        (~content.groups[content.groups.axis == "skin_tone"].eligible).any()
    )
    dark = content.groups.group == "dark"
    without = content.groups.assign(eligible=True)
    small = without.assign(eligible=~dark)
    n = content.groups[dark].n.iloc[0]
    assert "not judged, too few images" not in Page(render_report(replace(content, groups=without))).words
    assert f"not judged, too few images: dark (n = {n})" in Page(render_report(replace(content, groups=small))).words


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1) | st.none()), max_size=9))
def test_shares_fit_their_scale(shares):
    marks = [Mark(value, low, 1.0, "real", "") for value, low in shares]
    scale = share_scale([Row("", "", marks)])
    assert scale.high == 1
    assert scale.low <= min((value for pair in shares for value in pair if value is not None), default=0)
    assert len(scale.ticks) == len({scale.text(tick) for tick in scale.ticks}) == 5


def test_a_gain_that_rounds_to_nothing_has_no_minus():
    assert points(-0.0001) == "+0.0"
