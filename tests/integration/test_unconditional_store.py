"""A store that ignores conditions on writes: refused, unless the user accepts that one driver at a time is all that keeps rows whole."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer

from dragonclf import session, storage
from dragonclf.config import IndexConfig, TrainConfig
from dragonclf.data import tables
from dragonclf.engine import lease, plan, published, runs
from dragonclf.scores import read_scores
from dragonclf.storage import s3
from dragonclf.verbs.index import index
from dragonclf.verbs.train import train
from tests.conftest import use_identity, write_folder
from tests.integration.s3_proxy import S3Proxy

SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
OUT, SPEC = "s3://old/out", {"model": "m"}


CONDITIONS = ("if-match", "if-none-match")


@pytest.fixture(params=["ignores", "answers 501"])
def old_store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """moto, which does not check signatures, behind a proxy: it does what stores do that do not know the headers."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    upstream = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    urllib.request.urlopen(urllib.request.Request(f"{upstream}/moto-api/reset", method="POST")).close()
    ignores = request.param == "ignores"
    proxy = S3Proxy(upstream, strip=CONDITIONS if ignores else (), unknown=() if ignores else CONDITIONS)
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


@pytest.mark.slow  # the jobs of the whole way, on a Ray of their own
@pytest.mark.filterwarnings("ignore")  # Ray's own, in this process
@pytest.mark.parametrize("old_store", ["answers 501"], indirect=True)
def test_accepted_the_whole_way_works_and_a_picture_that_failed_in_passing_is_tried_again(
    old_store: None, tmp_path: Path
):
    for path in write_folder(tmp_path / "photos").rglob("*.jpg"):
        storage.put(f"s3://old/photos/{path.parent.name}/{path.name}", path.read_bytes())
    options = TrainConfig(
        data="s3://old/data", out="s3://old/training", size=64, epochs=2, max_failures=0, at_least_once=True, synthetic_canaries=True,
        mlflow_uri=f"sqlite:///{tmp_path}/mlflow.db",
    )  # fmt: skip
    with session.connect("local"):
        for _ in range(2):
            made = index(IndexConfig(source="s3://old/photos", out="s3://old/data", at_least_once=True))
            assert made.info.counts == {"ok": 24}
        lost = "s3://old/photos/red/003.jpg"
        content = storage.get(lost)
        s3._client().delete_object(Bucket="old", Key="photos/red/003.jpg")
        with pytest.raises(ValueError, match=r"red/003\.jpg was usable when it was indexed .* --retry-errors"):
            train(options)
        storage.put(lost, content)
        trained = train(options.model_copy(update={"retry_errors": True}))
    assert trained.metrics["valid_accuracy"] >= 0.8  # two colours
