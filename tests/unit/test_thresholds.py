"""Thresholds by class: against a search through every edge on individual probabilities, and whatever the number of workers."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from dragonclf.config import TrainConfig
from dragonclf.engine.layout import Layout
from dragonclf.model.predictor import softmax
from dragonclf.train import thresholds
from dragonclf.train.recipe import Recipe
from dragonclf.train.thresholds import EDGES, NEVER, Choice, choose
from dragonclf.verbs.evaluate import _accepted
from dragonclf.verbs.train import recipe as recipe_of
from tests.unit.test_bundle import save

CLASSES = ["a", "b", "c", "d"]


def recipe(**goal: float) -> Recipe:
    return recipe_of(TrainConfig.model_validate({"data": "d", "out": "o"} | goal))


def drawn(count: int = 600, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, 4) from which the classes were drawn: some labels are wrong, at every confidence."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(scale=2, size=(count, 4)).astype(np.float32))
    return logits, torch.from_numpy((logits.double().softmax(1).numpy().cumsum(1) < rng.random((count, 1))).sum(1))


def of_probs(rows: list[tuple[float, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two classes: (probability of the first class, true class) of each image."""
    probs = torch.tensor([[first, 1 - first] for first, _ in rows], dtype=torch.float64)
    return probs.log(), torch.tensor([truth for _, truth in rows])


def alone(sums: torch.Tensor) -> torch.Tensor:
    return sums


@pytest.mark.parametrize("goal", [0.3, 0.6, 0.75, 0.9, 0.97, 1.0])
def test_the_least_edge_of_that_precision_and_the_greatest_of_that_recall(goal: float):
    logits, targets = drawn()
    probs = softmax(logits.numpy())
    labels, confidence, truth = probs.argmax(1), probs.max(1), targets.numpy()
    for_precision = choose(logits, targets, alone, recipe(min_precision=goal))
    for_recall = choose(logits, targets, alone, recipe(min_recall=goal))
    for index in range(4):
        accepted = [(labels == index) & (confidence >= edge) for edge in EDGES.numpy()]
        right = np.array([(truth[mask] == index).sum() for mask in accepted])
        count = np.array([mask.sum() for mask in accepted])
        enough = [edge for edge in range(len(EDGES)) if count[edge] and right[edge] / count[edge] >= goal]
        found = for_precision[index]
        assert found["labelled"] == count[0]
        if enough:
            assert found["threshold"] == EDGES[enough[0]]
            assert (found["accepted"], found["reached"]) == (count[enough[0]], right[enough[0]] / count[enough[0]])
        else:
            assert found["threshold"] == NEVER
            assert found["reached"] == max(right[count > 0] / count[count > 0]) < goal
        total = (truth == index).sum()
        enough = [edge for edge in range(len(EDGES)) if right[edge] / total >= goal]
        found = for_recall[index]
        assert found["threshold"] == (EDGES[enough[-1]] if enough else 0)
        assert found["reached"] == right[enough[-1] if enough else 0] / total
    assert {choice["threshold"] == NEVER for choice in for_precision} == (
        {True} if goal == 1 else {False}
    ) or goal > 0.9


@pytest.mark.parametrize("goal", [0.5, 0.7, 0.8, 0.9])
def test_rows_that_do_not_abstain_have_the_precision(goal: float):
    """By the columns of scored rows, from thresholds that went through JSON's numbers."""
    logits, targets = drawn(seed=1)
    choices = choose(logits, targets, alone, recipe(min_precision=goal))
    own = {name: float(repr(choice["threshold"])) for name, choice in zip(CLASSES, choices, strict=True)}
    columns = Layout().answers(CLASSES, softmax(logits.numpy()), np.zeros(len(logits), bool), thresholds=own)
    rows = pd.DataFrame({name: column.to_pylist() for name, column in columns.items()})
    rows["truth"] = [CLASSES[target] for target in targets.tolist()]
    accepted = rows[~rows["abstain"]]
    assert (accepted["label"] == accepted["truth"]).groupby(accepted["label"]).mean().min() >= goal
    assert len(accepted) / len(rows) == thresholds.coverage(choices) > 0.1
    assert len(accepted) == sum(choice["accepted"] for choice in choices)


def test_equal_probabilities_are_accepted_together_or_not_at_all():
    images = [(0.9, 0), (0.8, 0), (0.8, 1), (0.8, 0), (0.7, 1), (0.1, 1)]
    for goal, accepted, reached in ((1.0, 1, 1.0), (0.75, 4, 0.75), (0.6, 5, 0.6)):
        first, second = choose(*of_probs(images), alone, recipe(min_precision=goal))
        assert (first["accepted"], first["reached"]) == (accepted, reached)
        assert (second["threshold"], second["accepted"], second["reached"]) == (0, 1, 1)
    first, _ = choose(*of_probs(images), alone, recipe(min_recall=0.5))
    assert (first["accepted"], first["reached"]) == (4, 1.0), "two of the class's three need 0.8, which a third one has"
    assert 0.79 < first["threshold"] <= 0.8


def test_a_share_is_compared_as_it_is_written():
    """7 of 100 are 0.07, though 0.07 * 100 is more than 7 in floats."""
    images = [(0.9, 0)] * 7 + [(0.9, 1)] * 93
    first, _ = choose(*of_probs(images), alone, recipe(min_precision=0.07))
    assert (first["threshold"], first["accepted"]) == (0, 100)


def test_what_cannot_be_reached_is_said():
    images = [(0.9, 1), (0.8, 0), (0.7, 1)]  # the first class is right in one of three, the second one is no label
    goal = recipe(min_precision=0.8)
    choices = choose(*of_probs(images), alone, goal)
    assert [(choice["threshold"], choice["accepted"], choice["labelled"]) for choice in choices] == [
        (NEVER, 0, 3),
        (NEVER, 0, 0),
    ]
    assert choices[0]["reached"] == 0.5
    assert math.isnan(choices[1]["reached"])
    assert thresholds.short_of(choices, ["cat", "dog"], goal) == (
        "no threshold reaches a precision of 0.8 for cat (0.5000), dog (no validation image tells): such a label is never accepted"
    )
    goal = recipe(min_recall=0.5)
    choices = choose(*of_probs([(0.9, 1), (0.8, 1)]), alone, goal)
    assert [choice["threshold"] for choice in choices] == [0, 0]
    assert thresholds.short_of(choices, ["cat", "dog"], goal) == (
        "no threshold reaches a recall of 0.5 for cat (no validation image tells), dog (0.0000): such a label is always accepted"
    )
    many = [Choice(threshold=NEVER, reached=0.1, accepted=0, labelled=1)] * 12
    said = thresholds.short_of(many, [f"c{i}" for i in range(12)], recipe(min_precision=0.5))
    assert said is not None
    assert "c9 (0.1000) and 2 more: such" in said
    assert thresholds.short_of(many, [""] * 12, recipe(min_precision=0.1)) is None


def test_no_goal_no_thresholds():
    assert choose(*drawn(), alone, recipe()) == []


@pytest.mark.parametrize("goal", [{"min_precision": 0.8}, {"min_recall": 0.8}])
def test_workers_choose_together_what_one_chooses(goal: dict[str, float]):
    """Three, of which the last has no image and does not know how many classes there are."""
    logits, targets = drawn()
    shares = [(logits[::2], targets[::2]), (logits[1::2], targets[1::2]), (torch.zeros(0, 1), targets[:0])]
    barrier, given = threading.Barrier(len(shares), timeout=30), [torch.empty(0)] * len(shares)

    def worker(rank: int) -> list[Choice]:
        def summed(sums: torch.Tensor) -> torch.Tensor:
            given[rank] = sums
            barrier.wait()
            total = torch.stack(given).sum(0)
            barrier.wait()
            return total

        return choose(*shares[rank], summed, recipe(**goal))

    with ThreadPoolExecutor(len(shares)) as pool:
        assert list(pool.map(worker, range(len(shares)))) == [choose(logits, targets, alone, recipe(**goal))] * 3


def test_edges_grow_and_scored_probabilities_can_be_compared_with_them():
    edges = EDGES.numpy()
    assert edges.dtype == np.float32
    assert edges[0] == 0
    assert 0.99999 <= edges[-1] < 1
    assert (np.diff(edges) > 0).all()
    assert np.diff(edges).max() < 0.0101
    assert [float(repr(float(edge))) for edge in edges] == edges.tolist()


def test_an_evaluation_tells_what_they_come_to_on_its_images(tmp_path: Path):
    info = save(f"{tmp_path}/m", classes=("a", "b"), thresholds={"a": 0.5, "b": 0.9}).info
    frame = pd.DataFrame(
        {
            "status": ["ok", "ok", "ok", "unreadable", "ok"], "label": ["a", "a", "b", None, "b"],
            "input_label": ["a", "b", "b", "a", "b"], "abstain": [False, False, True, None, False],
            "prob_a": [0.8, 0.8, 0.2, None, 0.05], "prob_b": [0.2, 0.2, 0.8, None, 0.95],
        }
    )  # fmt: skip
    assert _accepted(frame, info) == (0.75, pytest.approx(2 / 3))
    assert _accepted(frame.iloc[2:3], info) == (0, None)
    assert _accepted(frame, info.model_copy(update={"thresholds": {}})) == (None, None)
