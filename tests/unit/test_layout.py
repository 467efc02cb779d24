"""The columns of a scored row, as they are asked for."""

import numpy as np
import pyarrow as pa
import pytest

from dragonclf.engine.layout import Layout

CLASSES = ["drogon", "rhaegal", "viserion"]
PROBS = np.array([[0.2, 0.5, 0.3], [0.0, 0.0, 0.0], [0.7, 0.1, 0.2]], np.float32)
BAD = np.array([False, True, False])


def answers(
    layout: Layout,
    classes: list[str] = CLASSES,
    probs: np.ndarray = PROBS,
    *,
    thresholds: dict[str, float] | None = None,
) -> dict[str, list[object]]:
    return {
        name: column.to_pylist()
        for name, column in layout.answers(classes, probs, BAD, thresholds=thresholds or {}).items()
    }


def test_a_probability_for_each_class():
    found = answers(Layout())
    assert list(found) == ["label", "confidence", "prob_drogon", "prob_rhaegal", "prob_viserion"]
    assert found["label"] == ["rhaegal", None, "drogon"]
    assert found["confidence"] == [0.5, None, pytest.approx(0.7)]
    assert found["prob_viserion"] == [pytest.approx(0.3), None, pytest.approx(0.2)]


def test_past_32_classes_one_list():
    probs = np.random.default_rng(0).dirichlet(np.ones(33), 3).astype(np.float32)
    found = answers(Layout(), [f"c{i}" for i in range(33)], probs)
    assert list(found) == ["label", "confidence", "probs"]
    assert found["probs"][1] is None
    assert found["probs"][2] == probs[2].tolist()


def test_the_most_probable_classes_in_place_of_all():
    found = answers(Layout(top_k=2))
    assert list(found) == ["label", "confidence", "top_labels", "top_probs"]
    assert found["top_labels"] == [["rhaegal", "viserion"], None, ["drogon", "viserion"]]
    assert found["top_probs"] == [[0.5, pytest.approx(0.3)], None, [pytest.approx(0.7), pytest.approx(0.2)]]


def test_it_abstains_below_the_threshold_and_keeps_the_label():
    found = answers(Layout(threshold=0.6))
    assert found["abstain"] == [True, None, False]
    assert answers(Layout(threshold=0.7))["abstain"] == [True, None, False], (
        "0.7 is not less than 0.7 in float32 either"
    )
    assert found["label"] == ["rhaegal", None, "drogon"]


def test_it_abstains_below_the_models_own_threshold_of_the_label():
    own = {"drogon": 0.7, "rhaegal": 0.6, "viserion": 0.0}
    found = answers(Layout(), thresholds=own)
    assert list(found)[:3] == ["label", "confidence", "abstain"]
    assert found["abstain"] == [True, None, False], "0.7 is not less than 0.7 in float32 either"
    never = answers(Layout(), thresholds=own | {"rhaegal": 0.5, "drogon": 2.0}, probs=np.eye(3, dtype=np.float32))
    assert never["abstain"] == [True, None, False], "not even a certain label"
    assert answers(Layout(threshold=0.1), thresholds=own)["abstain"] == [False, None, False], "one for all overrides"
    assert "abstain" not in answers(Layout())


def test_only_the_columns_that_were_asked_for():
    table = pa.table({name: [1] for name in ("uri", "etag", "status", "error", "label", "confidence", "width")})
    layout = Layout(columns=("width", "label"))
    assert layout.chosen(table).column_names == ["uri", "etag", "status", "error", "label", "width"]
    assert Layout().chosen(table) == table


@pytest.mark.parametrize(
    ("layout", "classes", "said"),
    [
        (
            Layout(columns=("label", "prob_dragon")),
            CLASSES,
            "--columns names 'prob_dragon': there are uri, .*prob_drogon",
        ),
        (Layout(columns=("features",)), CLASSES, "--columns names 'features'"),
        (Layout(columns=("abstain",)), CLASSES, "--columns names 'abstain'"),
        (Layout(columns=("prob_drogon",), top_k=1), CLASSES, "--columns names 'prob_drogon': .* top_labels, top_probs"),
        (Layout(top_k=4), CLASSES, "--top-k 4 of a model of 3 classes"),
        (Layout(), ["a", "A"], "classes 'a' and 'A' differ in case only"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(layout: Layout, classes: list[str], said: str):
    with pytest.raises(ValueError, match=said):
        layout.check(classes, thresholds={}, embeddings=False)
    Layout(columns=("features", "abstain"), threshold=0.5).check(CLASSES, thresholds={}, embeddings=True)
    Layout(columns=("abstain",)).check(CLASSES, thresholds=dict.fromkeys(CLASSES, 0.5), embeddings=False)
