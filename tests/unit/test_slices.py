"""Slices against pandas' groups and cases counted by hand."""

import numpy as np
import pandas as pd
import pytest

from dragonclf.evaluate.metrics import wilson_interval
from dragonclf.evaluate.slices import SMALL, Slicing, slicings


def rows(num_images: int, **columns: object) -> pd.DataFrame:
    uris = [f"s3://b/{i:04}.{'JPG' if i % 2 else 'png'}" for i in range(num_images)]
    index = np.arange(num_images) * 3 + 7  # rows that count are some of a frame's
    return pd.DataFrame({"uri": uris, "status": "ok", "prob_a": 0.5, **columns}, index=index)


def named(found: list[Slicing], name: str) -> Slicing:
    [one] = [slicing for slicing in found if slicing.name == name]
    return one


def test_worst_first_with_intervals_and_small_ones_told() -> None:
    frame = rows(100, camera=["north"] * 60 + ["south"] * 20 + ["west"] * 20)
    is_right = np.array([True] * 45 + [False] * 15 + [True] * 5 + [False] * 15 + [True] * 15 + [False] * 5)
    found = named(slicings(frame, is_right=is_right), "camera").slices
    assert [(one.value, one.num_images, one.accuracy, one.is_small) for one in found] == [
        ("south", 20, 0.25, True), ("north", 60, 0.75, False), ("west", 20, 0.75, True),
    ]  # fmt: skip
    assert found[0].interval == wilson_interval(5, num_trials=20)
    assert SMALL == 30


def test_values_that_are_missing_are_a_slice() -> None:
    frame = rows(6, camera=["north", None, "north", None, "south", "south"], hot=[True, False, None, None, True, True])
    is_right = np.array([True, False, True, True, False, False])
    found = slicings(frame, is_right=is_right)
    assert {(one.value, one.num_images, one.accuracy) for one in named(found, "camera").slices} == {
        ("north", 2, 1.0), ("south", 2, 0.0), ("no value", 2, 0.5),
    }  # fmt: skip
    assert [(one.value, one.num_images) for one in named(found, "hot").slices] == [
        ("False", 1), ("True", 3), ("no value", 2),
    ]  # fmt: skip


def test_many_numbers_come_in_quarters() -> None:
    rng = np.random.default_rng(0)
    exposure = rng.normal(size=400)
    exposure[:8] = np.nan
    is_right = rng.random(400) < 0.7
    found = named(slicings(rows(400, exposure=exposure), is_right=is_right), "exposure").slices
    assert sorted(one.num_images for one in found) == [8, 98, 98, 98, 98]
    quarter = pd.qcut(pd.Series(exposure), 4)
    of_pandas = pd.Series(is_right).groupby(quarter, observed=True).mean().tolist()
    assert sorted(one.accuracy for one in found if one.value != "no value") == pytest.approx(sorted(of_pandas))
    least = named(
        slicings(rows(400, exposure=exposure), is_right=exposure > np.nanquantile(exposure, 0.25)), "exposure"
    )
    assert (
        least.slices[0].value
        == f"{np.nanmin(exposure):g} to {np.nanmax(exposure[exposure <= np.nanquantile(exposure, 0.25)]):g}"
    )


def test_many_names_are_the_most_frequent_and_the_rest() -> None:
    places = [f"place {i}" for i in range(30) for _ in range(30 - i)]
    found = named(slicings(rows(len(places), place=places), is_right=np.ones(len(places), bool)), "place").slices
    assert {one.value: one.num_images for one in found} == {f"place {i}": 30 - i for i in range(10)} | {
        "other (20 values)": sum(range(1, 21))
    }


def test_sizes_and_types_of_files() -> None:
    is_right = np.arange(40) % 2 == 0
    found = slicings(rows(40, width=[300] * 20 + [640] * 20, height=480), is_right=is_right)
    assert [slicing.name for slicing in found] == ["image size, in pixels", "type of the file"]
    assert {one.value for one in found[0].slices} == {"300 × 480", "640 × 480"}
    assert [(one.value, one.num_images, one.accuracy) for one in found[1].slices] == [
        (".jpg", 20, 0.0),
        (".png", 20, 1.0),
    ]
    found = slicings(rows(40, width=np.arange(40) + 100, height=200), is_right=is_right)
    assert {one.value for one in found[0].slices} == {
        f"shorter side {low} to {low + 9}" for low in (100, 110, 120, 130)
    }


def test_what_says_nothing_is_left_out() -> None:
    """One value for all, another for each, and what is no single value."""
    found = slicings(
        rows(40, constant="x", name=[f"n{i}" for i in range(40)], box=[[i, i] for i in range(40)]),
        is_right=np.ones(40, bool),
    )
    assert [slicing.name for slicing in found] == ["type of the file"]
