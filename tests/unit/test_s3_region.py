"""A bucket in another region than the configured one: SeaweedFS has no regions, moto does."""

import boto3
import pytest
from moto.server import ThreadedMotoServer

from dragonclf import storage
from dragonclf.storage import s3
from tests.conftest import use_identity


def test_images_are_read_from_the_buckets_own_region(monkeypatch: pytest.MonkeyPatch):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        env = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        use_identity(env | {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}, monkeypatch)
        client = boto3.client("s3", region_name="eu-west-1")
        client.create_bucket(Bucket="far-away", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
        assert s3._region("far-away") == "eu-west-1"
        storage.put("s3://far-away/a.jpg", b"pixels")
        assert [found.uri for found in storage.list_objects("s3://far-away")] == ["s3://far-away/a.jpg"]
    finally:
        server.stop()
        s3.forget_clients()
