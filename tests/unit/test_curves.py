"""Curves against scikit-learn, and cases computed by hand."""

import numpy as np
import pytest
import sklearn.metrics

from dragonclf.evaluate import curves


def scores(*, decimals: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether 500 images are of the class, and float32 scores with ties."""
    rng = np.random.default_rng(seed)
    is_positive = rng.random(500) < 0.3
    return is_positive, (rng.beta(2, 3, 500) * 0.6 + 0.3 * is_positive).round(decimals).astype(np.float32)


@pytest.mark.parametrize("decimals", [1, 3, 8])
def test_areas_and_curves_are_scikit_learns(decimals: int) -> None:
    is_positive, prob = scores(decimals=decimals, seed=decimals)
    ranked = curves.ranking(prob, is_positive=is_positive)
    assert ranked.auroc == pytest.approx(sklearn.metrics.roc_auc_score(is_positive, prob), abs=1e-12)
    found = sklearn.metrics.average_precision_score(is_positive, prob)
    assert ranked.average_precision == pytest.approx(found, abs=1e-12)
    false_rate, true_rate, _ = sklearn.metrics.roc_curve(is_positive, prob, drop_intermediate=False)
    np.testing.assert_allclose(ranked.roc(), (false_rate, true_rate), atol=1e-12)
    precision, recall, _ = sklearn.metrics.precision_recall_curve(is_positive, prob)
    np.testing.assert_allclose(ranked.precision_recall(), (recall[-2::-1], precision[-2::-1]), atol=1e-12)


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.4, 0.5, 0.725, 1.001])
def test_outcomes_are_scikit_learns_also_on_the_grid(threshold: float) -> None:
    is_positive, prob = scores(decimals=4, seed=1)
    ranked = curves.ranking(prob, is_positive=is_positive)
    taken = prob.astype(float) >= threshold
    tn, fp, fn, tp = sklearn.metrics.confusion_matrix(is_positive, taken).ravel().tolist()
    for one in (ranked, ranked.on_grid()):
        found = curves.outcome(one, threshold=threshold)
        assert found == curves.Outcome(tp, fp, fn, tn)
        assert found.f1 == pytest.approx(sklearn.metrics.f1_score(is_positive, taken), abs=1e-12)
        assert found.recall == pytest.approx(sklearn.metrics.recall_score(is_positive, taken), abs=1e-12)
        if taken.any():
            assert found.precision == pytest.approx(sklearn.metrics.precision_score(is_positive, taken), abs=1e-12)
        else:
            assert found.precision is None


def test_areas_that_are_not_defined() -> None:
    prob = np.array([0.2, 0.7])
    none, every = (curves.ranking(prob, is_positive=np.full(2, of_class)) for of_class in (False, True))
    assert (none.auroc, none.average_precision, every.auroc, every.average_precision) == (None, None, None, 1.0)


def test_reliability_by_hand() -> None:
    third = 10 / 15  # an edge: it belongs to the bin above
    first = np.array([third, third, 0.7, 1.0, 1.0, 0.5])
    found = curves.reliability(np.array([0, 1, 0, 0, 1, 1]), probs=np.stack([first, 1 - first], axis=1))
    assert found.num_images.tolist() == [0] * 7 + [1, 0, 0, 3, 0, 0, 0, 2]
    sure = 2 * third + 0.7  # of these three, two of which are right
    assert found.confidence[[7, 10, 14]] == pytest.approx([0.5, sure / 3, 1.0])
    assert found.accuracy[[7, 10, 14]] == pytest.approx([0.0, 2 / 3, 0.5])
    assert np.isnan(found.accuracy[0])
    assert found.error == pytest.approx((0.5 + abs(sure - 2) + 1) / 6, abs=1e-12)


def test_the_temperature_is_taken_back() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 4)) * 3
    raw, calibrated = (np.exp(values) / np.exp(values).sum(axis=1, keepdims=True) for values in (logits, logits / 1.7))
    np.testing.assert_allclose(curves.uncalibrated(calibrated, temperature=1.7), raw, atol=1e-12)


def test_thinned_lines_keep_what_can_be_seen() -> None:
    x = np.linspace(0, 1, 100_000)
    y = np.random.default_rng(0).random(len(x))
    y[54_321] = 9
    thin_x, thin_y = curves.thinned(x, y, columns=100)
    assert len(thin_x) <= 4 * 101
    assert (np.diff(thin_x) > 0).all()
    assert thin_y.max() == 9
    assert (thin_x[0], thin_x[-1], thin_y[0], thin_y[-1]) == (0, 1, y[0], y[-1])
    short = np.arange(5.0)
    assert curves.thinned(short, short)[0] is short
