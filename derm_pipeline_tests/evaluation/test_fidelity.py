"""Fréchet distance, KID, PRDC against closed forms and plain loops; the score table against its promises."""

from itertools import product

import numpy as np
import pytest

from derm_pipeline.evaluation.fidelity import (
    FeatureSet,
    FidelityConfig,
    compare,
    fidelity_table,
    frechet_distance,
    frechet_distance_of_features,
    kid,
    metric_name,
    mmd2,
    prdc,
)


@pytest.fixture
def rng():
    return np.random.default_rng()


def by_eigenvalues(mean1, cov1, mean2, cov2):
    roots = np.sqrt(np.clip(np.linalg.eigvals(cov1 @ cov2).real, 0, None))
    return np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * roots.sum()


def test_a_shift_of_one_in_every_dimension_is_as_far_as_there_are_dimensions():
    d = 2048
    assert frechet_distance(np.zeros(d), np.eye(d), np.ones(d), np.eye(d)) == pytest.approx(2048, rel=1e-12)


def test_four_times_the_covariance_is_as_far_as_its_trace(rng):
    features = rng.normal(size=(300, 64))
    cov = np.cov(features.T)
    mean = features.mean(axis=0)
    assert frechet_distance(mean, cov, mean, 4 * cov) == pytest.approx(np.trace(cov), rel=1e-10)


@pytest.mark.parametrize("n", [40, 64, 1000])
def test_identical_inputs_are_at_distance_zero_at_any_rank(rng, n):
    features = 30 * rng.normal(size=(n, 64)) * np.exp(-np.arange(64) / 3)
    cov = np.cov(features.T)
    mean = features.mean(axis=0)
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-6
    assert abs(frechet_distance_of_features(features, features.copy())) < 1e-6


@pytest.mark.parametrize(("n", "m"), list(product([5, 30, 31, 200], [7, 200])))
def test_features_and_moments_and_eigenvalues_agree_at_any_rank(rng, n, m):
    d = 30
    a = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    b = rng.normal(size=(m, d)) + 0.3
    moments = [np.mean(a, axis=0), np.cov(a.T), np.mean(b, axis=0), np.cov(b.T)]
    expected = by_eigenvalues(*moments)
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance_of_features(a, b) == pytest.approx(expected, rel=1e-4)


def test_rank_deficient_covariances_agree_with_their_closed_form(rng):
    basis = np.linalg.qr(rng.normal(size=(50, 50)))[0]
    spectrum1 = np.r_[rng.uniform(1, 5, 20), np.zeros(30)]
    spectrum2 = np.r_[np.zeros(10), rng.uniform(1, 5, 20), np.zeros(20)]
    cov1, cov2 = ((basis * s) @ basis.T for s in (spectrum1, spectrum2))
    expected = np.sum((np.sqrt(spectrum1) - np.sqrt(spectrum2)) ** 2)
    assert frechet_distance(np.zeros(50), cov1, np.zeros(50), cov2) == pytest.approx(expected, rel=1e-6)


def test_a_covariance_of_zero_leaves_the_other_trace(rng):
    cov = np.cov(rng.normal(size=(20, 4)).T)
    assert frechet_distance(np.zeros(4), cov, np.zeros(4), np.zeros((4, 4))) == pytest.approx(np.trace(cov))


def test_values_that_are_not_finite_and_shapes_that_do_not_fit_are_refused(rng):
    bad = rng.normal(size=(10, 4))
    bad[3, 2] = np.nan
    for function in (frechet_distance_of_features, mmd2, prdc):
        with pytest.raises(ValueError, match="finite"):
            function(bad, rng.normal(size=(10, 4)))
        with pytest.raises(ValueError, match="different length"):
            function(rng.normal(size=(10, 4)), rng.normal(size=(10, 5)))
    with pytest.raises(ValueError, match="do not fit"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), np.eye(4))


def kernel(x, y):
    return (x @ y / len(x) + 1) ** 3


def test_mmd_agrees_with_a_plain_loop(rng):
    a, b = rng.normal(size=(9, 6)), rng.normal(size=(7, 6)) + 0.5
    within_a = np.mean([kernel(a[i], a[j]) for i in range(9) for j in range(9) if i != j])
    within_b = np.mean([kernel(b[i], b[j]) for i in range(7) for j in range(7) if i != j])
    between = np.mean([kernel(x, y) for x in a for y in b])
    assert mmd2(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-10)


def test_mmd_is_unbiased_between_draws_of_one_distribution(rng):
    draws = [mmd2(rng.normal(size=(20, 5)), rng.normal(size=(20, 5))) for _ in range(2000)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(len(draws))


def test_kid_of_subsets_is_close_to_the_whole_and_repeats_with_its_seed(rng):
    a, b = rng.normal(size=(600, 8)), rng.normal(size=(500, 8)) + 0.4
    score = kid(a, b, subset_size=200, num_subsets=60, seed=3)
    assert score == kid(a, b, subset_size=200, num_subsets=60, seed=3)
    assert score.low < mmd2(a, b) < score.high
    assert score.mean == pytest.approx(mmd2(a, b), abs=5 * score.std / np.sqrt(60) + 0.02)
    with pytest.raises(ValueError, match="choose a subset_size"):
        kid(a, b, subset_size=501)


def test_prdc_agrees_with_a_plain_loop(rng, monkeypatch):
    monkeypatch.setattr("derm_pipeline.evaluation.distances._CHUNK", 7)
    real, fake, k = rng.normal(size=(40, 3)) + 50, 0.8 * rng.normal(size=(31, 3)) + 50.4, 4

    def radius(points, i):
        return sorted(np.linalg.norm(points - points[i], axis=1))[k]

    gaps = np.linalg.norm(real[:, None] - fake[None], axis=2)
    real_radii = [radius(real, i) for i in range(40)]
    fake_radii = [radius(fake, j) for j in range(31)]
    score = prdc(real, fake, k)
    assert score.precision == pytest.approx(
        np.mean([any(gaps[i, j] < real_radii[i] for i in range(40)) for j in range(31)])
    )
    assert score.recall == pytest.approx(
        np.mean([any(gaps[i, j] < fake_radii[j] for j in range(31)) for i in range(40)])
    )
    inside = [[gaps[i, j] < real_radii[i] for j in range(31)] for i in range(40)]
    assert score.density == pytest.approx(np.sum(inside) / k / 31)
    assert score.coverage == pytest.approx(np.mean([any(row) for row in inside]))


def test_samples_collapsed_into_one_mode_are_precise_and_cover_little(rng):
    real = np.concatenate([rng.normal(size=(100, 2)), rng.normal(size=(100, 2)) + 40])
    collapsed = 0.2 * rng.normal(size=(200, 2))
    score = prdc(real, collapsed)
    assert score.precision > 0.95
    assert score.recall < 0.2
    assert score.coverage < 0.4
    turned = prdc(collapsed, real)
    assert turned.precision < 0.2
    assert turned.recall > 0.95


def test_samples_far_away_score_nothing(rng):
    score = prdc(rng.normal(size=(50, 2)), rng.normal(size=(50, 2)) + 100)
    assert (score.precision, score.recall, score.density, score.coverage) == (0, 0, 0, 0)


def real_and_synthetic(rng, shift=0.0, num_lesions=300, num_synthetic=200, d=6):
    lesion = np.repeat(np.arange(num_lesions), rng.integers(1, 4, num_lesions))
    diagnosis = np.array(["mel", "nv", "nv"])[lesion % 3]
    centre = rng.normal(size=(num_lesions, d))[lesion] + (diagnosis == "nv")[:, None] * 3
    real = FeatureSet(centre + 0.05 * rng.normal(size=centre.shape), diagnosis.tolist(), lesion.tolist())
    wanted = np.repeat(["mel", "nv"], num_synthetic // 2)
    drawn = rng.normal(size=(len(wanted), d)) + (wanted == "nv")[:, None] * 3 + shift
    return real, FeatureSet(drawn, wanted.tolist())


ONE_EACH = FidelityConfig(one_image_per_lesion=True)


def test_synthetic_images_from_the_real_distribution_score_as_the_floor(rng):
    real, synthetic = real_and_synthetic(rng)
    rows = {(row.metric, row.group): row for row in compare(synthetic, real, "classifier", ONE_EACH)}
    kid_row = rows["kid_classifier", "all"]
    assert kid_row.low < kid_row.floor_high
    assert kid_row.ratio is None
    fd = rows["fd_classifier", "all"]
    assert 0.6 < fd.ratio < 1.6
    assert fd.ratio == pytest.approx(fd.value / fd.floor)
    assert fd.low <= fd.value <= fd.high


def test_shifted_synthetic_images_score_above_the_floor_in_every_group(rng):
    real, synthetic = real_and_synthetic(rng, shift=1.5)
    rows = {(row.metric, row.group): row for row in compare(synthetic, real, "dinov2")}
    for group in ("all", "mel", "nv"):
        assert rows["kid_dinov2", group].low > rows["kid_dinov2", group].floor_high
        assert rows["fd_dinov2", group].ratio > 2
    assert rows["precision_dinov2", "all"].ratio < 1


def test_several_images_of_a_lesion_raise_the_floor_unless_one_of_each_is_taken(rng):
    real, synthetic = real_and_synthetic(rng, num_lesions=150)

    def floor(**changes):
        rows = compare(synthetic, real, "classifier", FidelityConfig(num_repeats=40, **changes))
        return next(row for row in rows if row.metric == "kid_classifier" and row.group == "nv")

    one_each, every = floor(one_image_per_lesion=True), floor()
    assert every.floor > one_each.floor
    assert every.n > one_each.n


def test_the_three_sides_are_disjoint_in_lesions_and_equal_in_size_and_mix(rng, monkeypatch):
    real, synthetic = real_and_synthetic(rng, num_synthetic=60)
    real.features[:, 0] = real.lesion_id  # so that a row tells its lesion
    seen = []
    monkeypatch.setattr(
        "derm_pipeline.evaluation.fidelity.mmd2",
        lambda a, b, strata: seen.append((a[:, 0].copy(), b[:, 0].copy())) or 0.0,
    )
    compare(synthetic, real, "classifier", FidelityConfig(num_repeats=3))
    for index, (reference, other) in enumerate(seen):
        assert len(reference) == len(other)
        if index % 2:  # B against A
            assert not set(reference) & set(other)
            assert sorted(reference % 3 == 0) == sorted(other % 3 == 0)


def test_too_few_images_give_the_reason_and_no_number(rng):
    real, synthetic = real_and_synthetic(rng, num_lesions=60, num_synthetic=200, d=40)
    rows = {(row.metric, row.group): row for row in compare(synthetic, real, "classifier", ONE_EACH)}
    few = rows["kid_classifier", "mel"]
    assert few.n == 10
    assert (few.value, few.low, few.floor, few.ratio) == (None, None, None, None)
    assert "10 images a side, fewer than 20" in few.reason
    assert rows["kid_classifier", "all"].value is not None
    assert rows["fd_classifier", "all"].value is None
    assert "40 features" in rows["fd_classifier", "all"].reason


def test_a_diagnosis_without_synthetic_images_is_named(rng):
    real, synthetic = real_and_synthetic(rng)
    only_nv = FeatureSet(synthetic.features[100:], synthetic.diagnosis[100:])
    rows = {(row.metric, row.group): row for row in compare(only_nv, real, "classifier")}
    assert "without mel" in rows["kid_classifier", "all"].reason
    assert rows["kid_classifier", "mel"].value is None
    assert rows["kid_classifier", "mel"].n_synthetic == 0


def test_the_table_repeats_with_its_seed_and_reports_progress(rng):
    real, synthetic = real_and_synthetic(rng)
    calls = []
    first = compare(synthetic, real, "classifier", on_progress=lambda done, total: calls.append((done, total)))
    assert first == compare(synthetic, real, "classifier")
    assert calls == [(i + 1, 20) for i in range(20)]
    table = fidelity_table(first)
    assert list(table.group.unique()) == ["all", "mel", "nv"]
    assert len(table) == 18


def test_only_inception_gives_an_fid():
    assert metric_name("fd", "inception") == "fid"
    assert metric_name("fd", "dinov2") == "fd_dinov2"
    assert metric_name("kid", "inception") == "kid_inception"
    with pytest.raises(ValueError, match="extractor"):
        metric_name("fd", "My Net")


def test_features_without_lesions_or_labels_are_refused(rng):
    real, synthetic = real_and_synthetic(rng)
    with pytest.raises(ValueError, match="lesion id"):
        compare(synthetic, FeatureSet(real.features, real.diagnosis), "classifier")
    with pytest.raises(ValueError, match="diagnoses"):
        compare(FeatureSet(synthetic.features, ["nv"]), real, "classifier")


def test_the_stratified_estimate_is_unbiased_where_the_usual_one_is_not():
    rng = np.random.default_rng()
    strata = ["a"] * 6 + ["b"] * 18
    centres = {"a": 3.0, "b": -1.0}

    def draw():
        return np.stack([rng.normal(centres[label], 1.0, 4) for label in strata])

    pairs = [(draw(), draw()) for _ in range(400)]
    stratified = np.array([mmd2(a, b, strata=strata) for a, b in pairs])
    usual = np.array([mmd2(a, b) for a, b in pairs])
    error = stratified.std() / np.sqrt(len(pairs))
    assert abs(stratified.mean()) < 4 * error
    assert usual.mean() < -4 * error


def test_one_stratum_is_the_usual_estimate():
    rng = np.random.default_rng()
    a, b = rng.normal(size=(2, 30, 5))
    assert mmd2(a, b, strata=["x"] * 30) == pytest.approx(mmd2(a, b), rel=1e-9)
