"""What Learner makes of its arguments, and what it says when there is no model yet. Training is in integration/test_notebook.py."""

from typing import Any

import pytest

from dragonclf.data.snapshot import Snapshot, SnapshotInfo
from dragonclf.learner import ImageData, Learner

INFO = SnapshotInfo(
    id="0" * 12,
    source="/photos",
    classes=["drogon", "viserion"],
    num_images=2,
    counts={"ok": 2},
    num_files=1,
    splits={},
    unlabelled=0,
)
DATA = ImageData(Snapshot(uri="/data/snapshots/0", info=INFO), 96)
ARCH = "tf_efficientnet_lite0"


def of(learner: Learner, **given: Any) -> dict[str, Any]:
    return learner._training(**given).model_dump()


def test_what_a_call_gives_wins_over_the_learner_and_the_learner_over_the_recipe():
    learner = Learner(ARCH, DATA, recipe="elpv-finetune", weight_decay=0.1, epochs=7, out="/out")
    found = of(learner, lr=0.5, epochs=None)
    assert (found["lr"], found["epochs"], found["weight_decay"], found["flips"]) == (0.5, 7, 0.1, "both")
    assert (found["precompute"], found["size"], found["arch"], found["out"]) == (False, 96, ARCH, "/out/models")
    assert of(Learner(ARCH, DATA))["precompute"] is True


def test_what_is_frozen_holds_for_the_calls_to_come():
    learner = Learner(ARCH, DATA)
    names = ("precompute", "freeze_to", "freeze_epochs")
    told = []
    for call in (lambda: None, learner.freeze, learner.unfreeze, lambda: learner.freeze_to(-2)):
        call()
        told.append(tuple(of(learner)[name] for name in names))
    assert told == [(True, 0, 1), (False, -1, 0), (False, 0, 0), (False, -2, 0)]


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"epoch\n.*not permitted"):
        of(Learner(ARCH, DATA, epoch=3))


@pytest.mark.parametrize(
    "call", [lambda one: one.predict(), lambda one: one.report(), lambda one: one.plot_uncertain(), lambda one: one.plot_results(),
             lambda one: one.export("/somewhere")],
)  # fmt: skip
def test_without_a_model_it_says_what_to_do(call: Any):
    with pytest.raises(ValueError, match="there is no trained model yet: call fit first"):
        call(Learner(ARCH, DATA))


def test_without_a_sweep_it_says_what_to_do():
    with pytest.raises(ValueError, match="call lr_find first"):
        Learner(ARCH, DATA).plot_lr_find()
