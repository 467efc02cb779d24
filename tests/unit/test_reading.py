"""What docs/reading.md says can be pasted: its Python, DuckDB and pandas on a published run."""

import re
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pytest

from dragonclf import storage
from dragonclf.engine import lease, plan, published, runs

ROOT = Path(__file__).parents[2]
SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
STATUSES = ["ok", "ok", "missing", "ok", "ok"]


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A published run of five images, and an unpublished one."""
    out = str(tmp_path / "scores")
    for model, is_finished in (("m1", True), ("m2", False)):
        rows = pa.Table.from_pylist([{"uri": f"/in/{i}", "etag": "e", "size": 5} for i in range(5)], schema=SCHEMA)
        with lease.Lease(runs.lease_uri(out, "score", {"model": model})) as held:
            run = runs.open_run(
                out, "score", {"model": model}, lambda: plan.stage_plan([rows], shard_images=2), held=held  # noqa: B023
            )  # fmt: skip
            for shard in runs.missing_shards(run)[: None if is_finished else 1]:
                planned = plan.read_shard(run.uri, run.plan, shard)
                status = pa.array(STATUSES[2 * shard : 2 * shard + planned.num_rows])
                table = planned.append_column("status", status).append_column("label", status)
                runs.write_part(run, shard, table.append_column("confidence", pa.array([0.5] * planned.num_rows)))
            if is_finished:
                published.point_to(out, runs.publish(run, fence=held.fence))
    return tmp_path / "scores"


def block(heading: str, language: str, scores: Path) -> str:
    """The code under a heading of the page, with the names of its example made those of `scores`."""
    text = (ROOT / "docs/reading.md").read_text()
    (found,) = re.findall(rf"\*\*{heading}\*\*.*?```{language}\n(.*?)```", text, flags=re.DOTALL)[:1]
    run = storage.name(published.read_latest(str(scores)))
    return found.replace("s3://work/scores", str(scores)).replace("3786b5735ccd-00001", run)


def test_python_and_duckdb_on_its_dataset(scores: Path):
    names: dict[str, object] = {}
    exec(block("Python", "python", scores), names)
    frame = names["frame"]
    assert isinstance(frame, pd.DataFrame)
    assert sorted(frame["uri"]) == [f"/in/{i}" for i in range(5)]
    (query,) = re.findall(r'duckdb\.sql\("(.*?)"\)', (ROOT / "docs/reading.md").read_text())
    assert dict(duckdb.connect().register("scores", names["scores"]).execute(query).fetchall()) == {
        "ok": 4,
        "missing": 1,
    }


def test_duckdb_on_the_files(scores: Path):
    db = duckdb.connect()
    *before, query = [part for part in block("DuckDB", "sql", scores).split(";") if part.strip()]
    for statement in before:
        db.execute(statement)
    assert dict(db.execute(query).fetchall()) == {"ok": 4, "missing": 1}


def test_pandas(scores: Path):
    names: dict[str, object] = {}
    exec(block("pandas", "python", scores), names)
    frame = names["frame"]
    assert isinstance(frame, pd.DataFrame)
    assert frame["status"].value_counts().to_dict() == {"ok": 4, "missing": 1}
