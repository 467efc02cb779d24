"""The digest of rows: every cell counts, no cut does."""

import itertools

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from dragonclf.data.digest import RowDigest

SCHEMA = pa.schema(
    [
        ("uri", pa.string()), ("size", pa.int64()), ("x", pa.float64()), ("flag", pa.bool_()), ("tags", pa.list_(pa.string())),
        ("day", pa.date32()),
    ]
)  # fmt: skip
ROW = st.fixed_dictionaries(
    {
        "uri": st.none() | st.text(st.sampled_from("ab\0é"), max_size=3), "size": st.none() | st.integers(0, 2),
        "x": st.none() | st.sampled_from([0.0, 0.5]), "flag": st.none() | st.booleans(),
        "tags": st.none() | st.lists(st.text("ab", max_size=2), max_size=2), "day": st.none() | st.dates(),
    }
)  # fmt: skip


def digest(*tables: pa.Table) -> str:
    found = RowDigest()
    for table in tables:
        found.update(table)
    return found.hexdigest()


@settings(max_examples=100, deadline=None)
@given(st.lists(ROW, max_size=8), st.lists(st.integers(0, 8), max_size=3), st.lists(ROW, max_size=8))
def test_equal_rows_have_equal_digests_however_they_are_cut_and_others_have_others(
    rows: list[dict[str, object]], cuts: list[int], others: list[dict[str, object]]
):
    whole = pa.Table.from_pylist(rows, schema=SCHEMA)
    bounds = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    parts = [whole.slice(start, stop - start) for start, stop in itertools.pairwise(bounds)]
    assert digest(*parts) == digest(whole) == digest(pa.concat_tables(parts))
    assert (digest(pa.Table.from_pylist(others, schema=SCHEMA)) == digest(whole)) == (others == rows)


def test_cells_do_not_run_into_each_other():
    def one(**columns: object) -> str:
        return digest(pa.table(columns))

    digests = [
        one(a=["ab", "c"]), one(a=["a", "bc"]), one(a=["abc", ""]), one(a=["abc", None]), one(a=[None, "abc"]), one(b=["ab", "c"]),
        one(a=["ab"], b=["c"]), one(a=["a"], b=["bc"]), one(a=[["a", "b"]]), one(a=[["a"], ["b"]]), one(a=[0]), one(a=[None, 0]),
        one(a=pa.array([0, None])), one(a=pa.array([0], pa.int32())), one(a=[False]), one(a=pa.array([0, 0])), one(),
    ]  # fmt: skip
    assert len(set(digests)) == len(digests)


def test_what_lies_under_a_null_does_not_count():
    hidden = pa.Array.from_buffers(
        pa.string(), 2, [pa.py_buffer(b"\x01"), pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"axx")]
    )
    assert hidden.to_pylist() == ["a", None]
    assert digest(pa.table({"a": hidden})) == digest(pa.table({"a": ["a", None]}))
