"""Every figure against a plain loop; intervals against known laws; gains against a literal paired bootstrap."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy.stats import rankdata
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from derm_pipeline.evaluation.bootstrap import Cell, Figure, estimate, expected_minimum, interval
from derm_pipeline.evaluation.demographics import age_band, demographics, unknown_counts
from derm_pipeline.evaluation.groups import (
    GroupConfig,
    compare_arms,
    group_metrics,
)
from derm_pipeline.records import Diagnosis, Record, SkinType, records_table

CLASSES = [str(diagnosis) for diagnosis in tuple(Diagnosis)[:7]]


@pytest.fixture
def rng():
    return np.random.default_rng()


def draw(rng, num_lesions=220, arms=("real", "both"), seeds=(0, 1, 2), skill=None):
    """A long table of predictions that are right more often in some arms."""
    lesion = np.repeat(np.arange(num_lesions), rng.integers(1, 4, num_lesions))
    count = len(lesion)
    images = pd.DataFrame(
        {
            "image_id": [f"i{i:04d}" for i in range(count)],
            "lesion_id": [f"l{i}" for i in lesion],
            "diagnosis": rng.choice(CLASSES, num_lesions, p=[0.1, 0.1, 0.15, 0.05, 0.2, 0.35, 0.05])[lesion],
            "skin_tone": rng.choice(["light", "medium", "dark", None], num_lesions)[lesion],
            "sex": rng.choice(["female", "male"], num_lesions)[lesion],
        }
    )
    parts = []
    for arm in arms:
        for seed in seeds:
            logits = rng.normal(size=(count, 7))
            logits[np.arange(count), [CLASSES.index(d) for d in images.diagnosis]] += (skill or {}).get(arm, 1.2)
            shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            part = images.assign(arm=arm, seed=seed, predicted=[CLASSES[i] for i in shares.argmax(axis=1)])
            part[[f"p_{name}" for name in CLASSES]] = shares
            parts.append(part.sample(frac=1, random_state=int(rng.integers(2**31))))  # the order must not matter
    return pd.concat(parts, ignore_index=True)


def mean_over_seeds(table, arm, function):
    return np.mean([function(part) for _, part in table[table.arm == arm].groupby("seed")])


def balanced(part):
    right = part.predicted.to_numpy() == part.diagnosis.to_numpy()
    return np.mean([right[part.diagnosis == c].mean() for c in part.diagnosis.unique()])


def area(scores, positive):
    ranks = rankdata(scores)[positive]
    return (ranks.mean() - (len(ranks) + 1) / 2) / (len(scores) - len(ranks))


def test_overall_figures_agree_with_sklearn_and_plain_loops(rng):
    table = draw(rng)
    figures = group_metrics(table).overall.set_index(["arm", "metric"]).value

    def auroc(part):
        return roc_auc_score(part.diagnosis, part[[f"p_{c}" for c in CLASSES]], multi_class="ovr", labels=CLASSES)

    def brier(part):
        truth = pd.get_dummies(part.diagnosis).reindex(columns=CLASSES).to_numpy(float)
        return ((part[[f"p_{c}" for c in CLASSES]].to_numpy() - truth) ** 2).sum(axis=1).mean()

    def calibration(part):
        shares = part[[f"p_{c}" for c in CLASSES]].to_numpy()
        confidence, right = shares.max(axis=1), part.predicted.to_numpy() == part.diagnosis.to_numpy()
        total = 0.0
        for b in range(15):
            inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
            if inside.any():
                total += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
        return total

    for arm in ("real", "both"):
        for metric, function in {
            "balanced_accuracy": lambda part: balanced_accuracy_score(part.diagnosis, part.predicted),
            "accuracy": lambda part: (part.diagnosis == part.predicted).mean(),
            "macro_auroc": auroc,
            "brier_score": brier,
            "expected_calibration_error": calibration,
        }.items():
            assert figures[arm, metric] == pytest.approx(mean_over_seeds(table, arm, function), abs=1e-10), metric


def test_ties_count_one_half_in_auroc(rng):
    table = draw(rng)
    columns = [f"p_{c}" for c in CLASSES]
    table[columns] = table[columns].round(1)
    figures = group_metrics(table).overall.set_index(["arm", "metric"]).value
    expected = mean_over_seeds(
        table, "real", lambda p: np.mean([roc_auc_score(p.diagnosis == c, p[f"p_{c}"]) for c in CLASSES])
    )
    assert figures["real", "macro_auroc"] == pytest.approx(expected, abs=1e-10)


def test_group_figures_agree_with_plain_loops(rng):
    table = draw(rng)
    groups = group_metrics(table).groups.set_index(["arm", "axis", "group"])
    real = table[table.arm == "real"]
    for tone in ("light", "medium", "dark"):
        part = real[real.skin_tone == tone]
        expected = np.mean([balanced(p) for _, p in part.groupby("seed")])
        row = groups.loc[("real", "skin_tone", tone)]
        assert row.metric == "balanced_accuracy"
        assert row.value == pytest.approx(expected)
        assert row.n == part.image_id.nunique()
        assert row.n_clusters == part.lesion_id.nunique()
        assert set(row.classes.split(",")) == set(part.diagnosis)
        sizes = part[part.seed == 0].diagnosis.value_counts()
        assert row.n_effective == pytest.approx(len(sizes) ** 2 / (1 / sizes).sum())
        malignant = part[part.diagnosis.isin(["mel", "bcc", "akiec"])]
        row = groups.loc[("real", "malignant x skin_tone", f"malignant x {tone}")]
        assert row.metric == "malignant_sensitivity"
        assert row.value == pytest.approx(malignant.predicted.isin(["mel", "bcc", "akiec"]).mean())
        part = part[part.diagnosis == "nv"]
        row = groups.loc[("real", "diagnosis x skin_tone", f"nv x {tone}")]
        assert (row.metric, row.n) == ("recall", part.image_id.nunique())
        assert row.value == pytest.approx((part.predicted == "nv").mean())


def test_images_of_unknown_group_are_left_out_and_counted(rng):
    table = draw(rng)
    result = group_metrics(table)
    row = result.left_out.set_index("axis").loc["skin_tone"]
    first = table[(table.arm == "real") & (table.seed == 0)]
    assert (row.n, row.n_left_out) == (len(first), first.skin_tone.isna().sum())
    tones = result.groups[(result.groups.axis == "skin_tone") & (result.groups.arm == "real")]
    assert tones.n.sum() == row.n - row.n_left_out


def test_axes_without_their_columns_are_left_out(rng):
    table = draw(rng).drop(columns=["skin_tone"])
    assert set(group_metrics(table).groups.axis) == {"diagnosis", "sex"}


def test_melanoma_sensitivity_takes_its_threshold_from_val(rng):
    table, val = draw(rng), draw(rng)
    val["lesion_id"] = "v" + val.lesion_id
    result = group_metrics(table, val=val)
    rows = result.overall.set_index(["arm", "metric"])
    hits, clears = [], []
    for seed in (0, 1, 2):
        negatives = val[(val.arm == "both") & (val.seed == seed) & (val.diagnosis != "mel")].p_mel
        threshold = min(t for t in np.nextafter(negatives, 2) if (negatives < t).mean() >= 0.9)
        part = table[(table.arm == "both") & (table.seed == seed)]
        hits.append((part[part.diagnosis == "mel"].p_mel >= threshold).mean())
        clears.append((part[part.diagnosis != "mel"].p_mel < threshold).mean())
    row = rows.loc[("both", "melanoma_sensitivity_at_90_specificity")]
    assert row.value == pytest.approx(np.mean(hits))
    assert row.low < row.value < row.high
    assert rows.loc[("both", "melanoma_specificity_at_that_threshold")].value == pytest.approx(np.mean(clears))


def test_without_val_the_melanoma_figure_says_that_it_is_read_off_the_test_curve(rng):
    result = group_metrics(draw(rng))
    row = result.overall.set_index(["arm", "metric"]).loc[
        ("real", "melanoma_sensitivity_on_test_roc_at_90_specificity")
    ]
    assert np.isnan(row.low)
    assert np.isnan(row.high)
    assert 0 < row.value <= 1


def test_groups_that_are_too_small_are_shown_and_cannot_be_the_worst(rng):
    table = draw(rng)
    few = table.lesion_id.isin(table.lesion_id.unique()[:8])
    table["sex"] = table.sex.mask(few, "rare")
    table.loc[few, "predicted"] = np.where(table.diagnosis[few] == "nv", "mel", "nv")  # all wrong
    result = group_metrics(table, GroupConfig(axes=(("sex",),), min_group_size=30, flag_below=10_000))
    rare = result.groups.set_index(["arm", "group"]).loc[("real", "rare")]
    assert rare.value == 0
    assert not rare.eligible
    assert rare.size_flag == "too few"
    assert rare.interval == "wilson"
    assert 0 < rare.high < 1
    assert set(result.worst.group) <= {"female", "male"}
    assert set(result.worst.size_flag) == {"few"}
    assert "rare" not in set(result.gains.group)


def test_the_worst_group_is_the_least_of_its_axis(rng):
    result = group_metrics(draw(rng))
    for row in result.worst.itertuples():
        same = result.groups[
            (result.groups.arm == row.arm)
            & (result.groups.axis == row.axis)
            & (result.groups.metric == row.metric)
            & result.groups.eligible
        ]
        assert row.group_min == same.value.min()
        assert row.group_max == same.value.max()
        assert row.group == same.group.iloc[same.value.argmin()]
        assert row.difference == pytest.approx(row.group_max - row.group_min)
        assert row.ratio == pytest.approx(row.group_min / row.group_max)
        assert row.num_groups == len(same)
        assert row.null_minimum <= same.value.mean() + 0.01  # it is simulated


def test_six_groups_of_recall_080_and_30_images_show_a_minimum_of_0705():
    mean, draws = expected_minimum(0.8, [[30]] * 6, num_draws=40_000)
    assert mean == pytest.approx(0.705, abs=0.003)
    assert draws.min() >= 0


def test_the_null_minimum_of_a_balanced_accuracy_averages_its_classes(rng):
    mean, _ = expected_minimum(0.7, [[10, 1000], [20]], num_draws=40_000)
    one = (rng.binomial(10, 0.7, 40_000) / 10 + rng.binomial(1000, 0.7, 40_000) / 1000) / 2
    assert mean == pytest.approx(np.minimum(one, rng.binomial(20, 0.7, 40_000) / 20).mean(), abs=0.005)


def test_alike_groups_are_seldom_called_different(rng):
    p_values = []
    for _ in range(30):
        table = pd.DataFrame(
            {
                "image_id": [f"i{i}" for i in range(240)],
                "lesion_id": [f"l{i}" for i in range(240)],
                "diagnosis": "nv",
                "sex": np.repeat(["a", "b", "c", "d", "e", "f"], 40),
                "arm": "real",
                "seed": 0,
                "predicted": rng.choice(["nv", "mel"], 240, p=[0.8, 0.2]),
                "p_mel": 0.5,
                "p_nv": 0.5,
            }
        )
        result = group_metrics(table, GroupConfig(axes=(("sex",),), num_bootstrap=100))
        p_values.append(result.worst.null_p_value.iloc[0])
    assert np.mean(np.array(p_values) < 0.05) < 0.3
    assert np.mean(np.array(p_values) > 0.3) > 0.35


def one_arm(right, clusters):
    return Figure("sex", "all", "recall", (Cell(np.arange(len(right)), right[:, None, None, None].astype(float)),))


def covered(rng, share, lesions, images_each, trials=300):
    inside = 0
    for _ in range(trials):
        right = np.repeat(rng.random(lesions) < share, images_each)
        clusters = np.repeat(np.arange(lesions), images_each)
        figure = one_arm(right, clusters)
        found = estimate([figure], clusters, 400, int(rng.integers(2**31)), resample_seeds=True)
        low, high, _ = interval(figure, found.values[0, 0], found.replicates[:, 0, 0], clusters, 0.95)
        inside += low <= share <= high
    return inside / trials


def test_intervals_cover_a_known_binomial_also_when_images_of_a_lesion_agree(rng):
    assert 0.87 < covered(rng, 0.7, 100, 1) <= 1
    assert 0.87 < covered(rng, 0.7, 60, 3) <= 1
    # Nearly all are right: percentiles alone would be a point in most trials, and miss.
    assert covered(rng, 0.99, 40, 1) > 0.9


def test_an_interval_is_as_wide_as_a_literal_bootstrap_over_lesions(rng):
    table = draw(rng, arms=("real",), seeds=(0,))
    by_lesion = [part for _, part in table.groupby("lesion_id")]
    literal = []
    for _ in range(150):
        part = pd.concat([by_lesion[i] for i in rng.integers(len(by_lesion), size=len(by_lesion))])
        literal.append(
            [balanced(part), np.mean([area(part[f"p_{c}"], part.diagnosis == c) for c in part.diagnosis.unique()])]
        )
    rows = group_metrics(table).overall.set_index("metric")
    for column, metric in enumerate(["balanced_accuracy", "macro_auroc"]):
        width = rows.loc[metric].high - rows.loc[metric].low
        assert width == pytest.approx(2 * 1.96 * np.std(np.array(literal)[:, column]), rel=0.25), metric


def test_a_paired_gain_agrees_with_a_literal_paired_bootstrap(rng):
    table = draw(rng, skill={"real": 1.0, "both": 1.6}, seeds=(0,))
    config = GroupConfig(axes=(("skin_tone",), ("sex",)), resample_seeds=False)
    gains = compare_arms(table, config).set_index(["axis", "group", "metric"])
    by_lesion = [part for _, part in table.groupby("lesion_id")]
    literal = []
    for _ in range(150):
        part = pd.concat([by_lesion[i] for i in rng.integers(len(by_lesion), size=len(by_lesion))])
        both, real = part[part.arm == "both"], part[part.arm == "real"]
        worst = [min(balanced(p) for _, p in arm.groupby("sex")) for arm in (both, real)]
        literal.append([balanced(both) - balanced(real), worst[0] - worst[1]])
    for column, key in enumerate([("overall", "all", "balanced_accuracy"), ("sex", "worst", "balanced_accuracy")]):
        row = gains.loc[key]
        assert row.high - row.low == pytest.approx(2 * 1.96 * np.std(np.array(literal)[:, column]), rel=0.3)
        assert row.low < row.gain < row.high
        assert row.gain == pytest.approx(row.value - row.baseline_value)
    assert gains.loc[("overall", "all", "balanced_accuracy")].gain == pytest.approx(
        mean_over_seeds(table, "both", balanced) - mean_over_seeds(table, "real", balanced)
    )


def test_an_arm_equal_to_the_baseline_gains_exactly_nothing(rng):
    table = draw(rng, arms=("real",), seeds=(0,))
    gains = compare_arms(pd.concat([table, table.assign(arm="copy")]))
    interval_columns = gains[["gain", "low", "high"]].fillna(0).to_numpy()
    np.testing.assert_allclose(interval_columns, 0, atol=1e-12)
    assert set(gains.arm) == {"copy"}


def test_a_pairing_makes_the_interval_narrower_than_two_separate_ones(rng):
    table = draw(rng, arms=("real",), seeds=(0,))
    other = table.assign(arm="both")
    changed = rng.random(len(other)) < 0.05
    other.loc[changed, "predicted"] = "nv"
    result = group_metrics(pd.concat([table, other]))
    row = result.gains.set_index(["axis", "metric"]).loc[("overall", "accuracy")]
    separate = result.overall[result.overall.metric == "accuracy"]
    assert row.high - row.low < 0.6 * (separate.high - separate.low).min()


def test_the_luck_of_training_widens_the_interval_of_a_gain(rng):
    table = draw(rng, seeds=(0, 1, 2))
    lucky = (table.arm == "both") & (table.seed == 1)
    table.loc[lucky, "predicted"] = table.diagnosis[lucky]
    with_luck, without = (
        compare_arms(table, GroupConfig(resample_seeds=flag)).set_index(["axis", "metric", "group"])
        for flag in (True, False)
    )
    key = ("overall", "accuracy", "all")
    assert with_luck.loc[key].high - with_luck.loc[key].low > 1.5 * (without.loc[key].high - without.loc[key].low)


def test_the_tables_repeat_with_the_seed_whatever_the_order_of_rows(rng):
    table = draw(rng)
    first, second = group_metrics(table), group_metrics(table.sample(frac=1, random_state=1))
    for name in ("overall", "groups", "worst", "gains", "left_out"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name))


def test_bad_predictions_are_refused_with_the_reason(rng):
    table = draw(rng)
    with pytest.raises(ValueError, match="lesion_id"):
        group_metrics(table.drop(columns="lesion_id"))
    with pytest.raises(ValueError, match="the same"):
        group_metrics(table.drop(index=table.index[3]))
    with pytest.raises(ValueError, match="twice"):
        group_metrics(pd.concat([table, table.iloc[:1]]))
    with pytest.raises(ValueError, match="no p_ column"):
        group_metrics(table.assign(predicted="eczema"))
    with pytest.raises(ValueError, match="finite"):
        group_metrics(table.assign(p_nv=np.nan))
    with pytest.raises(ValueError, match="choose one of both, real"):
        compare_arms(table, baseline="synthetic")
    with pytest.raises(ValueError, match="same arms"):
        group_metrics(table, val=table[table.arm == "real"])


def test_ages_fall_into_bands():
    assert [age_band(a) for a in (0, 29, 30, 49, 50, 69, 70, 99)] == [
        *["0-29"] * 2,
        *["30-49"] * 2,
        *["50-69"] * 2,
        *["70+"] * 2,
    ]
    assert age_band(29.5) == "0-29"
    assert age_band(None) is None
    assert age_band(float("nan")) is None
    with pytest.raises(ValueError, match="age -1"):
        age_band(-1)


def record(image_id, **known):
    return Record(
        source="phantom",
        image_id=image_id,
        file=f"{image_id}.jpg",
        sha256="0",
        size_bytes=1,
        width_px=1,
        height_px=1,
        modality="clinical",
        diagnosis="mel",
        source_label="mel",
        malignant=True,
        **known,
    )


def test_a_range_of_ages_has_a_band_where_it_lies_within_one():
    ages = ["18-29", "30-39", "80-120", "25-34", None]
    found = demographics(records_table([record(f"i{index}", age_range=ages[index]) for index in range(5)]))
    assert found.age_band.tolist() == ["0-29", "30-49", "70+", None, None]


def test_an_archives_lesion_is_one_in_every_source_and_ethnicity_is_a_group():
    found = demographics(records_table([record("a", lesion_id="HAM_0000118", ethnicity="asian"), record("b")]))
    assert found.lesion_id.tolist() == ["HAM_0000118", "phantom/b"]
    assert found.ethnicity.tolist() == ["asian", None]


def test_demographics_come_from_the_records_and_what_is_unknown_stays_unknown():
    table = records_table(
        [
            record(
                "a",
                lesion_id="l1",
                patient_id="p1",
                skin_type=SkinType.V,
                skin_tone="dark",
                age_years=71,
                sex="male",
                site="back",
            ),
            record("b", patient_id="p2"),
            record("c"),
        ]
    )
    for given in (table, table.to_pandas()):
        groups = demographics(given)
        assert groups.skin_tone.tolist() == ["dark", None, None]
        assert groups.age_band.tolist() == ["70+", None, None]
        assert groups.lesion_id.tolist() == ["phantom/l1", "phantom/p2", "phantom/c"]
        assert groups.patient_id.tolist() == ["phantom/p1", "phantom/p2", "phantom/c"]
        assert "ethnicity" not in groups
        assert unknown_counts(groups) == {"skin_tone": 2, "sex": 2, "age_band": 2, "site": 2}
    assert isinstance(table, pa.Table)
