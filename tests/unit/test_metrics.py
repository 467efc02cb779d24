"""Figures against scikit-learn, scipy and a case computed by hand."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import sklearn.metrics

from dragonclf.evaluate.metrics import MIN_PROB, Metrics, classification_metrics, counted_rows, wilson_interval


def random_predictions(*, num_images: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Targets drawn from the probabilities themselves, so that the classifier is good, and calibrated."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(num_classes), size=num_images)
    targets = (probs.cumsum(axis=1) < rng.random((num_images, 1))).sum(axis=1)
    return targets, probs


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_scikit_learn(num_classes: int, seed: int) -> None:
    targets, probs = random_predictions(num_images=700, num_classes=num_classes, seed=seed)
    found = classification_metrics(targets, probs=probs, classes=[f"class {k}" for k in range(num_classes)])

    predicted = probs.argmax(axis=1)
    assert found.num_images == 700
    assert found.accuracy == pytest.approx(sklearn.metrics.accuracy_score(targets, predicted), abs=1e-12)
    assert found.log_loss == pytest.approx(sklearn.metrics.log_loss(targets, probs), abs=1e-6)
    auroc = (
        sklearn.metrics.roc_auc_score(targets, probs[:, 1])
        if num_classes == 2
        else sklearn.metrics.roc_auc_score(targets, probs, multi_class="ovr", average="macro")
    )
    assert found.auroc == pytest.approx(auroc, abs=1e-6)
    assert found.confusion == sklearn.metrics.confusion_matrix(targets, predicted).tolist()
    reference = sklearn.metrics.precision_recall_fscore_support(targets, predicted)
    per_class = [[one.precision, one.recall, one.f1, one.support] for one in found.per_class]
    np.testing.assert_allclose(np.array(per_class), np.array(reference).T, atol=1e-12)


def test_ties_and_float32_agree_with_scikit_learn() -> None:
    targets, probs = random_predictions(num_images=900, num_classes=2, seed=7)
    coarse = np.stack([1 - probs[:, 1].round(1), probs[:, 1].round(1)], axis=1).astype(np.float32)
    found = classification_metrics(targets, probs=coarse, classes=["a", "b"])
    assert found.auroc == pytest.approx(sklearn.metrics.roc_auc_score(targets, coarse[:, 1]), abs=1e-6)
    assert found.log_loss == pytest.approx(sklearn.metrics.log_loss(targets, coarse), abs=1e-5)


def test_four_images_by_hand() -> None:
    probs = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.75, 0.25]])
    found = classification_metrics(np.array([0, 0, 1, 1]), probs=probs, classes=["drogon", "viserion"])
    assert found.accuracy == 0.5
    assert found.confusion == [[1, 1], [1, 1]]
    assert found.auroc == 0.75  # of the four (viserion, drogon) pairs, only 0.25 against 0.6 is the wrong way round
    assert found.ece == pytest.approx((0.1 + 0.6 + 0.2 + 0.75) / 4, abs=1e-6)
    assert found.log_loss == pytest.approx(-(np.log(0.9) + np.log(0.4) + np.log(0.8) + np.log(0.25)) / 4, abs=1e-12)
    assert [one.model_dump() for one in found.per_class] == [
        {"name": name, "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2} for name in ("drogon", "viserion")
    ]
    # z = 1.96, n = 4, p = 1/2: the centre is 1/2, half the width z / (1 + z^2/4) * sqrt(1/16 + z^2/64) = 0.35
    assert found.accuracy_interval == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert Metrics.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(("num_right", "num_images"), [(0, 8), (7, 8), (8, 8), (311, 1000), (999_999, 1_000_000)])
def test_interval_is_wilsons(num_right: int, num_images: int) -> None:
    reference = scipy.stats.binomtest(num_right, num_images).proportion_ci(method="wilson")
    found = wilson_interval(num_right, num_trials=num_images)
    assert found == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert 0 <= found[0] <= num_right / num_images <= found[1] <= 1


def test_figures_that_are_undefined_are_none() -> None:
    probs = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
    found = classification_metrics(np.array([0, 0]), probs=probs, classes=["a", "b", "c"])
    assert found.auroc is None
    assert (found.per_class[0].precision, found.per_class[0].recall) == (1.0, 1.0)
    assert found.per_class[1].model_dump() == {"name": "b", "precision": None, "recall": None, "f1": None, "support": 0}


def test_auroc_of_many_classes_is_over_those_present() -> None:
    targets, probs = random_predictions(num_images=300, num_classes=3, seed=1)
    with_absent = np.concatenate([probs * 0.9, np.full((300, 1), 0.1)], axis=1)
    found = classification_metrics(targets, probs=with_absent, classes=["a", "b", "c", "absent"])
    reference = sklearn.metrics.roc_auc_score(targets, probs, multi_class="ovr", average="macro")
    assert found.auroc == pytest.approx(reference, abs=1e-6)


def test_perfect_and_certain_is_finite() -> None:
    found = classification_metrics(np.array([0, 1, 1]), probs=np.eye(2)[[0, 1, 1]], classes=["a", "b"])
    assert (found.accuracy, found.auroc, found.log_loss) == (1.0, 1.0, 0.0)
    wrong = classification_metrics(np.array([1, 0, 0]), probs=np.eye(2)[[0, 1, 1]], classes=["a", "b"])
    assert (wrong.accuracy, wrong.auroc) == (0.0, 0.0)
    assert wrong.log_loss == pytest.approx(-np.log(MIN_PROB))


def test_no_image_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="evaluate a split that holds labelled, readable images"):
        classification_metrics(np.array([], dtype=int), probs=np.zeros((0, 2)), classes=["a", "b"])


def test_a_probability_that_is_not_finite_is_refused() -> None:
    probs = np.array([[0.5, 0.5], [np.nan, np.nan]])
    with pytest.raises(ValueError, match="1 of 2 images have a probability that is not finite"):
        classification_metrics(np.array([0, 1]), probs=probs, classes=["a", "b"])


def test_counted_rows_leave_out_bad_and_unlabelled_ones() -> None:
    frame = pd.DataFrame(
        {
            "uri": ["/1", "/2", "/3", "/4"],
            "status": ["ok", "unreadable", "ok", "ok"],
            "input_label": ["b", "a", None, "a"],
            "prob_a": [0.25, None, 0.5, 0.75],
            "prob_b": [0.75, None, 0.5, 0.25],
        }
    )
    rows, targets, probs = counted_rows(frame, classes=["a", "b"])
    assert rows["uri"].tolist() == ["/1", "/4"]
    assert targets.tolist() == [1, 0]
    assert probs.tolist() == [[0.25, 0.75], [0.75, 0.25]]
    with pytest.raises(ValueError, match=r"input_label 'b' \(1 in all\) is not among the model's classes \['a', 'c'\]"):
        counted_rows(frame, classes=["a", "c"])
