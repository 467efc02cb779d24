"""A store that ignores conditions on writes: refused, unless the user accepts that one driver at a time is all that keeps rows whole."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer

from dragonclf import storage
from dragonclf.data import tables
from dragonclf.engine import lease, plan, published, runs
from dragonclf.scores import read_scores
from dragonclf.storage import s3
from tests.conftest import use_identity
from tests.integration.s3_proxy import S3Proxy

SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
OUT, SPEC = "s3://old/out", {"model": "m"}


@pytest.fixture
def old_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """moto, which does not check signatures, behind a proxy that loses the headers: what a store does that does not know them."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = S3Proxy(f"http://127.0.0.1:{server.get_host_and_port()[1]}", strip=("if-match", "if-none-match"))
    environment = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
    use_identity(environment | {"AWS_ENDPOINT_URL": proxy.endpoint}, monkeypatch)
    s3._client().create_bucket(Bucket="old")
    yield
    proxy.close()
    server.stop()
    s3.forget_clients()


def stage() -> plan.StagedPlan:
    rows = [{"uri": f"/in/{i}", "etag": "e", "size": 1} for i in range(5)]
    return plan.stage_plan([pa.Table.from_pylist(rows, schema=SCHEMA)], shard_images=2)


def test_it_is_refused_by_name_of_the_flag_that_accepts_it(old_store: None):
    with lease.Lease(runs.lease_uri(OUT, "score", SPEC)) as held, pytest.raises(ValueError, match="--at-least-once"):
        runs.open_run(OUT, "score", SPEC, stage, held=held)
    assert [found.uri for found in storage.list_objects(OUT) if not found.uri.endswith(".lease.json")] == []


def test_accepted_one_driver_is_exact_and_resumes(old_store: None, tmp_path: Path):
    for _ in range(2):  # the second finds the parts of the first
        with lease.Lease(runs.lease_uri(OUT, "score", SPEC), at_least_once=True) as held:
            run = runs.open_run(OUT, "score", SPEC, stage, held=held)
            assert not run.atomic
            for shard in runs.missing_shards(run)[:2]:
                planned = plan.read_shard(run.uri, run.plan, shard)
                assert runs.begin_shard(run, shard) == 1
                table = planned.append_column("status", pa.array(["ok"] * planned.num_rows))
                assert runs.write_part(run, shard, table) == runs.write_part(run, shard, table)
            if not runs.missing_shards(run):
                published.point_to(OUT, runs.publish(run, fence=held.fence), atomic=held.atomic)
    assert sorted(read_scores(OUT).to_table()["uri"].to_pylist()) == [f"/in/{i}" for i in range(5)]
    assert tables.read_footer(f"{published.read_latest(OUT)}/parts/00000000.parquet")[0] == 2
