"""Suspected label errors: the rule by hand, folds that keep copies together, planted flips, probabilities as scikit-learn has them."""

import hashlib

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dragonclf.evaluate.label_errors import suspects
from dragonclf.train import held_out
from dragonclf.train.held_out import folds, held_out_probs


def blobs(count: int, *, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Features (N, 8) of three classes around points of their own, labels, and a group for each."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    features = rng.normal(0, spread, (count, 8)) + 3 * np.eye(3, 8)[labels]
    groups = [hashlib.sha256(row.tobytes()).hexdigest() for row in features]
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels), groups


def test_the_confident_joint_by_hand():
    # Labels 0 have probabilities .9, .8, .1 of class 0: its threshold is .6. Labels 1 have .7, .4, .3 of class 1: .4667.
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7], [0.6, 0.4], [0.55, 0.45], [0.45, 0.55]])
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    # Of labels 1: .7, .4, .45, .55, mean .525. Row 4 is confidently a 0 (.6 >= .6); row 5 (.55) of no class, so no suspect.
    found = suspects(probs, labels)
    assert found.is_suspect.tolist() == [False, False, True, False, True, False, False]
    assert found.suggested.tolist() == [0, 0, 1, 1, 0, 0, 1]
    assert found.margin == pytest.approx([0.8, 0.6, -0.8, 0.4, -0.2, -0.1, 0.1])
    assert found.order.tolist() == [2, 4, 5, 6, 3, 1, 0]


def test_a_class_that_the_model_is_rarely_sure_of_needs_less():
    # Threshold of class 1 is .3, so the third image is confidently a 1 as well; but its label is likelier still.
    probs = np.array([[0.7, 0.3], [0.95, 0.05], [0.6, 0.4], [0.1, 0.9]])
    assert not suspects(probs, np.array([1, 0, 0, 0])).is_suspect[2]
    three = np.array([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2], [0.2, 0.35, 0.45], [0.0, 0.1, 0.9]])
    found = suspects(three, np.array([1, 0, 2, 2]))
    assert found.is_suspect.tolist() == [True, False, False, False]
    assert found.suggested[0] == 2


def test_a_class_without_images_is_nobodys():
    found = suspects(np.array([[0.2, 0.1, 0.7], [0.9, 0.1, 0.0]]), np.array([0, 0]))
    assert not found.is_suspect.any()
    assert suspects(np.zeros((0, 2)), np.zeros(0, np.int64)).order.tolist() == []


def test_folds_keep_groups_together_and_spread_each_class():
    labels = [0] * 50 + [1] * 23 + [2] * 2 + [3] * 4
    groups = [f"g{i}" for i in range(75)] + ["only"] * 4
    groups[10] = groups[60] = "shared"  # copies with two labels
    found = folds(labels, groups)
    assert found[10] == found[60]
    assert (found[75:] == -1).all()
    counts = [np.bincount(found[np.array(labels) == label], minlength=5) for label in (0, 1)]
    assert all(max(count) - min(count) <= 2 for count in counts)
    assert found[73] != found[74]
    shuffled = np.random.default_rng(0).permutation(len(labels))
    again = folds([labels[i] for i in shuffled], [groups[i] for i in shuffled])
    assert (np.sort(again) == np.sort(found)).all()
    assert (folds(labels, groups, seed=1) != found).any()


def test_probabilities_are_those_of_scikit_learn_on_the_same_folds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(held_out, "WEIGHT_DECAYS", (0.01,))
    features, labels, groups = blobs(200, seed=0)
    others = blobs(30, seed=1)[0]
    probs, predicted = held_out_probs(features, labels, groups, others, num_classes=3)

    def reference(train: np.ndarray, test: np.ndarray, targets: np.ndarray) -> np.ndarray:
        mean, std = train.mean(0), train.std(0)
        model = LogisticRegression(C=1 / (0.01 * len(train)), tol=1e-8, max_iter=1000).fit(
            (train - mean) / std, targets
        )
        return model.predict_proba((test - mean) / std)

    fold, x, y = folds(labels.tolist(), groups), features.double().numpy(), labels.numpy()
    for number in range(5):
        expected = reference(x[fold != number], x[fold == number], y[fold != number])
        assert probs[fold == number] == pytest.approx(expected, abs=2e-3)
    assert predicted == pytest.approx(reference(x, others.double().numpy(), y), abs=2e-3)


def test_planted_flips_come_first():
    features, labels, groups = blobs(400, seed=2, spread=0.8)
    flips = np.random.default_rng(3).choice(400, 20, replace=False)
    labels[flips] = (labels[flips] + 1) % 3
    probs, _ = held_out_probs(features, labels, groups, features[:0], num_classes=3)
    assert len(set(flips.tolist()).intersection(suspects(probs, labels.numpy()).order[:25].tolist())) >= 18
    assert (held_out_probs(features, labels, groups, features[:0], num_classes=3)[0] == probs).all()


def test_copies_of_a_wrong_label_do_not_vouch_for_it():
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 3, 300)
    features = torch.from_numpy((rng.normal(0, 0.8, (300, 64)) + 3 * np.eye(3, 64)[truth]).astype(np.float32))
    labels, flips = torch.from_numpy(truth), rng.choice(300, 15, replace=False)
    labels[flips] = (labels[flips] + 1) % 3
    copied = np.repeat(flips, 3)
    features, labels = torch.cat([features, features[copied]]), torch.cat([labels, labels[copied]])
    wrong = {*flips.tolist(), *range(300, 345)}

    def num_found(groups: list[str]) -> int:
        probs, _ = held_out_probs(features, labels, groups, features[:0], num_classes=3)
        return len(wrong.intersection(suspects(probs, labels.numpy()).order[: len(wrong)].tolist()))

    one_each = [str(i) for i in range(345)]
    assert num_found([*one_each[:300], *(one_each[i] for i in copied)]) > 2 / 3 * len(wrong)
    assert num_found(one_each) < 1 / 4 * len(wrong), "in other folds they do"


def test_an_image_without_another_of_its_class_is_not_judged():
    features, labels, groups = blobs(60, seed=4)
    labels[0] = 3
    probs, _ = held_out_probs(features, labels, groups, features[:0], num_classes=4)
    assert np.flatnonzero(np.isnan(probs).any(1)).tolist() == [0]
