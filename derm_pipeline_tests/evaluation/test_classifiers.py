"""Classifiers: they learn, they are the same for the same seed, and finished ones are not trained again."""

import random

import numpy as np
import pytest
import torch

from derm_pipeline.evaluation.classifiers import (
    ClassifierConfig,
    LabelledImages,
    Prediction,
    agreement,
    arm_data,
    augment,
    balanced_accuracy,
    load_classifier,
    predict,
    repeat_factors,
    train_arms,
    train_classifier,
    weights_name,
)
from derm_pipeline.records import Diagnosis

CLASSES = [diagnosis.value for diagnosis in tuple(Diagnosis)[:7]]
MEL, NV = CLASSES.index("mel"), CLASSES.index("nv")


def config(**changes):
    return ClassifierConfig(**{"width": 8, "num_steps": 40, "batch_size": 16, "num_seeds": 1} | changes)


def two_colours(num, share=0.5):
    """Reddish melanomas and bluish naevi, (num, 16, 16, 3)."""
    rng = np.random.default_rng()
    diagnoses = np.where(rng.random(num) < share, MEL, NV)
    diagnoses[:2] = MEL, NV
    images = rng.integers(60, 140, (num, 16, 16, 3))
    images[diagnoses == MEL, ..., 0] += 80
    images[diagnoses == NV, ..., 2] += 80
    return LabelledImages(images.astype(np.uint8), diagnoses, len(CLASSES))


def states(models):
    return {which: model.state_dict() for which, model in models.items()}


def equal(one, other):
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_an_easy_problem_is_learned():
    data, unseen = two_colours(200), two_colours(100)
    model = train_classifier(data, config(num_steps=60), seed=3)
    found = predict(model, unseen.images)
    assert balanced_accuracy(unseen.diagnoses, found.probabilities.argmax(1)) > 0.95
    assert found.probabilities.shape == (100, len(CLASSES))
    assert found.features.shape == (100, 32)
    assert np.allclose(found.probabilities.sum(1), 1, atol=1e-5)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    data = two_colours(40)
    weights = [train_classifier(data, config(num_steps=4), seed=seed).state_dict() for seed in (1, 1, 2)]
    assert equal(weights[0], weights[1])
    assert not equal(weights[0], weights[2])


def test_balancing_draws_the_rare_diagnosis_as_often(monkeypatch):
    from derm_pipeline.evaluation import classifiers

    seen = []
    measured = classifiers.to_model_range
    monkeypatch.setattr(classifiers, "to_model_range", lambda images: seen.append(images) or measured(images))
    data = two_colours(200, share=0.05)
    shares = []
    for balance in (0.0, 1.0):
        seen.clear()
        train_classifier(data, config(num_steps=40), seed=0, balance=balance)
        drawn = torch.cat(seen).float().mean((1, 2))
        shares.append(float((drawn[:, 0] > drawn[:, 2]).float().mean()))
    assert shares[0] == pytest.approx((data.diagnoses == MEL).mean(), abs=0.04)
    assert shares[1] == pytest.approx(0.5, abs=0.1)


def test_repeats_follow_lesiongens_law_on_the_counts_of_ham10000():
    counts = np.array([6705, 1113, 1099, 514, 327, 142, 115])
    repeats = repeat_factors(counts)
    assert repeats.tolist() == [1, 6, 6, 13, 20, 47, 58]
    assert int((counts * repeats).sum()) == 46_543


def test_repeated_images_come_as_often_as_the_law_says(monkeypatch):
    from derm_pipeline.evaluation import classifiers

    diagnoses = np.random.default_rng().permutation(np.repeat([MEL, NV], [3, 30]))
    images = np.broadcast_to(np.arange(33, dtype=np.uint8)[:, None, None, None], (33, 8, 8, 3)).copy()
    seen = []
    measured = classifiers.to_model_range
    monkeypatch.setattr(classifiers, "to_model_range", lambda images: seen.append(images) or measured(images))
    settings = config(num_steps=6, batch_size=10)
    train_classifier(LabelledImages(images, diagnoses, len(CLASSES)), settings, seed=0, balance="repeats")
    drawn = torch.cat(seen)[:, 0, 0, 0].numpy()
    assert len(drawn) == 60 == 3 * 10 + 30
    assert np.bincount(drawn, minlength=33).tolist() == np.where(diagnoses == MEL, 10, 1).tolist()


def test_arms_are_trained_on_what_they_are_called():
    real, synthetic = two_colours(30), two_colours(20)
    assert arm_data("real", real, synthetic) is real
    assert arm_data("oversampling", real, synthetic) is real
    assert arm_data("synthetic", real, synthetic) is synthetic
    both = arm_data("real+synthetic", real, synthetic)
    assert np.array_equal(both.images, np.concatenate([real.images, synthetic.images]))
    assert np.array_equal(both.diagnoses, np.concatenate([real.diagnoses, synthetic.diagnoses]))


def test_augmentation_turns_the_batch_and_changes_each_brightness_a_little():
    images = torch.rand(6, 3, 8, 8) * 2 - 1
    stream = torch.Generator().manual_seed(random.randrange(1000))
    changed = augment(images, stream)
    assert changed.shape == images.shape
    assert (changed.flatten(1).sort().values - images.flatten(1).sort().values).abs().max() <= 0.2 + 1e-6
    offsets = changed.mean((1, 2, 3)) - images.mean((1, 2, 3))
    assert len({round(float(offset), 6) for offset in offsets}) == 6


def test_predictions_do_not_depend_on_the_batch_size():
    data = two_colours(30)
    model = train_classifier(data, config(num_steps=3), seed=0)
    whole, parts = predict(model, data.images), predict(model, data.images, batch_size=7)
    assert np.allclose(whole.probabilities, parts.probabilities, atol=1e-5)
    assert np.allclose(whole.features, parts.features, atol=1e-4)


def test_balanced_accuracy_is_the_mean_recall_of_what_occurs():
    rng = np.random.default_rng()
    for _ in range(20):
        truth = rng.integers(0, rng.integers(1, 8), 50)
        predicted = rng.integers(0, 7, 50)
        recalls = []
        for diagnosis in set(truth.tolist()):
            of_it = [p for t, p in zip(truth, predicted, strict=True) if t == diagnosis]
            recalls.append(sum(p == diagnosis for p in of_it) / len(of_it))
        assert balanced_accuracy(truth, predicted) == pytest.approx(sum(recalls) / len(recalls))


def test_agreement_counts_what_was_asked_for():
    rng = np.random.default_rng()
    asked = rng.integers(0, 5, 60)
    probabilities = rng.dirichlet(np.ones(7), 60).astype(np.float32)
    found = agreement(Prediction(probabilities, probabilities), asked, CLASSES)
    right = [int(row.argmax()) == want for row, want in zip(probabilities, asked, strict=True)]
    assert found["all"] == pytest.approx(sum(right) / 60)
    assert set(found) == {"all"} | {CLASSES[index] for index in asked}
    for index, diagnosis in enumerate(CLASSES):
        of_it = [ok for ok, want in zip(right, asked, strict=True) if want == index]
        if of_it:
            assert found[diagnosis] == pytest.approx(sum(of_it) / len(of_it))


@pytest.mark.slow
def test_arms_are_trained_apart_and_finished_ones_are_kept(tmp_path):
    real, synthetic = two_colours(60), two_colours(40)
    settings = config(num_seeds=2, num_steps=6, arms=("real", "real+synthetic"))
    told = []
    out, work = tmp_path / "weights", tmp_path / "work"
    work.mkdir()
    models = train_arms(real, synthetic, settings, out=out, work=work, on_progress=lambda *step: told.append(step[:2]))
    assert set(models) == {(arm, seed) for arm in ("real", "real+synthetic") for seed in (0, 1)}
    assert told == [(done, 4) for done in range(1, 5)]
    assert sorted(path.name for path in out.iterdir()) == sorted(weights_name(*which) for which in models)
    trained = states(models)
    kept, lost = weights_name("real", 0), weights_name("real+synthetic", 1)
    (out / lost).unlink()
    time_ns = (out / kept).stat().st_mtime_ns
    told.clear()
    again = train_arms(real, synthetic, settings, out=out, work=work, on_progress=lambda *step: told.append(step[:2]))
    assert told == [(4, 4)]
    assert (out / kept).stat().st_mtime_ns == time_ns
    assert all(equal(trained[which], weights) for which, weights in states(again).items())
    loaded = load_classifier(out / kept, settings, len(CLASSES)).state_dict()
    assert equal(loaded, trained["real", 0])
