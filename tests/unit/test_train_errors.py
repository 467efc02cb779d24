"""What a user is told when Ray says that training failed."""

import logging

import pytest
from ray.train import FailureConfig, WorkerGroupError
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from dragonclf import storage
from dragonclf.data.snapshot import Snapshot
from dragonclf.verbs.train import _say_no_better
from dragonclf.verbs.train_workers import _cause, _Policy
from tests.unit.test_learner import INFO

LOST = "Training failed due to worker errors:\n[Rank 0 Error Snippet]:\n{}\nSee the log"
# As Ray 2.60 has it.
NO_MEMORY = """1 worker(s) were killed due to the node running low on memory. Memory on the node was 21.75GB used / 23.54GB limit
To disable worker killing, set the environment variable `RAY_memory_monitor_refresh_ms` to zero."""


@pytest.mark.parametrize(
    ("told", "kind", "text"),
    [
        ("Traceback:\n  ...\nValueError: the loss is nan in epoch 2: lower --lr", ValueError, "the loss is nan in epoch 2: lower --lr"),
        ("dragonclf.storage.errors.AccessDeniedError: no right to read s3://a/b", storage.StorageError, "no right to read s3://a/b"),
        (NO_MEMORY, storage.StorageError, "a machine ran out of memory, and Ray ended its workers: .* larger --accumulate"),
        ("the worker is gone", storage.StorageError, "training failed: See the log; the same command resumes"),
    ],
)  # fmt: skip
def test_the_cause_is_what_the_worker_said(told: str, kind: type[Exception], text: str):
    found = _cause(RuntimeError(LOST.format(told)))
    assert isinstance(found, kind)
    with pytest.raises(kind, match=text):
        raise found


@pytest.mark.parametrize(
    ("told", "decision"),
    [
        ("ValueError: the loss is nan in epoch 2: lower --lr", FailureDecision.RAISE),
        (NO_MEMORY, FailureDecision.RETRY),
        ("dragonclf.storage.errors.StorageError: cannot read s3://a/b: timeout", FailureDecision.RETRY),
        ("the worker is gone", FailureDecision.RETRY),
    ],
)
def test_what_a_user_has_to_mend_is_not_tried_again(told: str, decision: FailureDecision):
    assert _Policy(FailureConfig(max_failures=1)).make_decision(WorkerGroupError(told, {})) == decision


@pytest.mark.parametrize(("accuracy", "is_told"), [(0.6, True), (0.5, True), (0.61, False)])
def test_a_model_that_looks_at_no_image_is_told(accuracy: float, is_told: bool, caplog: pytest.LogCaptureFixture):
    info = INFO.model_copy(
        update={"splits": {"train": {"drogon": 1, "viserion": 9}, "valid": {"drogon": 6, "viserion": 4}}}
    )
    with caplog.at_level(logging.WARNING, logger="dragonclf"):
        _say_no_better(accuracy, Snapshot(uri="/data/snapshots/0", info=info))
    told = "no better than to answer 'drogon' always: valid accuracy 0.6000, and 0.6000 of the images are that; a lower --lr"
    assert (told.replace("accuracy 0.6000", f"accuracy {accuracy:.4f}") in caplog.text) == is_told
