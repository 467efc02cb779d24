"""Objects on S3 and what speaks its protocol. The only module that knows S3 options.

boto3 lists, writes and owns the credentials chain (environment, profile, SSO, instance and pod roles; endpoint and region by the
standard ``AWS_*`` variables). obstore fetches image bytes, at a third of boto3's CPU, wherever its normalised path equals the key;
boto3 fetches the rest. Throttling, 5xx and lost connections are tried again with backoff and jitter, for a bounded time: what
does not pass in half a minute is for a person, not for patience.
"""

import asyncio
import contextlib
import functools
import math
import re
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import botocore.exceptions
import obstore
from botocore.config import Config
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store
from pyarrow import fs

from dragonclf.storage import listing_answer, parallel_listing
from dragonclf.storage.errors import (
    CredentialsError,
    ObjectInfo,
    ObjectMissingError,
    StorageError,
    first_line,
    missing,
)
from dragonclf.storage.parallel_listing import Page
from dragonclf.storage.s3_errors import FIRST_WAIT_S, LONGEST_WAIT_S, RETRY_S, call, denied, no_bucket

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 15  # between two bytes of an answer
FETCH_TIMEOUT_S = 25  # of one image, whole
PART_BYTES, MAX_PARTS = 16 * 2**20, 10_000  # of a file's upload; S3 takes no more parts
CHUNK_BYTES = 2**20  # of a download
PAGE_KEYS = 1000  # of a listing: S3's most

# Known to list in another order than by the keys' bytes: SeaweedFS goes folder by folder, and so do S3's directory buckets.
_UNORDERED_SERVER, _UNORDERED_BUCKET = "SeaweedFS", "--x-s3"


def split(uri: str) -> tuple[str, str]:
    """Split an ``s3://`` URI into (bucket, key)."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def list_objects(uri: str) -> Iterator[ObjectInfo]:
    bucket, prefix = split(uri)
    if prefix and not prefix.endswith("/"):
        prefix += "/"

    def list_page(*, start_after: str | None = None, token: str | None = None) -> Page:
        where = {"ContinuationToken": token} if token else {"StartAfter": start_after} if start_after else {}
        found = call(
            "list", uri,
            lambda: _client().list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=PAGE_KEYS, **where),  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        entries = [(item["Key"], item["ETag"].strip('"'), item["Size"]) for item in found.get("Contents", [])]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        server = found["ResponseMetadata"]["HTTPHeaders"].get("server", "")
        return Page(
            entries, found.get("NextContinuationToken") if found.get("IsTruncated") else None,
            may_split=not server.startswith(_UNORDERED_SERVER) and not bucket.endswith(_UNORDERED_BUCKET),
        )  # fmt: skip

    for key, etag, size in parallel_listing.list_entries(list_page, prefix):
        yield ObjectInfo(f"s3://{bucket}/{key}", etag, size)


def stat(uri: str) -> ObjectInfo | None:
    bucket, key = split(uri)
    if not key:
        return None

    def head() -> ObjectInfo:
        try:
            found = _client().head_object(Bucket=bucket, Key=key)
        except botocore.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("400", "403"):
                _client().get_object(Bucket=bucket, Key=key)[
                    "Body"
                ].close()  # a HEAD's answer has no room for the cause
            raise
        return ObjectInfo(uri, found["ETag"].strip('"'), found["ContentLength"])

    try:
        return call("read", uri, head)
    except ObjectMissingError:
        return None


def get(uri: str, *, last_bytes: int | None = None) -> tuple[bytes, str]:
    return call("read", uri, lambda: _get(uri, last_bytes))


def download(uri: str, path: Path) -> None:
    bucket, key = split(uri)
    if not key:
        raise missing("read", uri)

    def copy() -> None:
        body = _client().get_object(Bucket=bucket, Key=key)["Body"]
        with path.open("wb") as file:
            for chunk in body.iter_chunks(CHUNK_BYTES):
                file.write(chunk)

    call("read", uri, copy)


def put(uri: str, data: bytes) -> None:
    bucket, key = split(uri)
    call("write", uri, lambda: _client().put_object(Bucket=bucket, Key=key, Body=data))


def put_file(uri: str, path: Path) -> None:
    """Write in parts, of which each is tried again by itself. The object is there, whole, once the last request is done."""
    bucket, key = split(uri)
    num_bytes = path.stat().st_size
    part_bytes = max(PART_BYTES, -(-num_bytes // MAX_PARTS))
    if num_bytes <= part_bytes:
        put(uri, path.read_bytes())
        return
    begun = call("write", uri, lambda: _client().create_multipart_upload(Bucket=bucket, Key=key))
    upload_id, parts = begun["UploadId"], []
    try:
        with open(path, "rb") as file:
            while data := file.read(part_bytes):
                parts.append(_put_part(uri, upload_id, len(parts) + 1, data))
        call(
            "write", uri,
            lambda: _client().complete_multipart_upload(
                Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}
            ),
        )  # fmt: skip
    except BaseException:
        with contextlib.suppress(StorageError):  # the parts of an upload that is not ended are kept, and paid for
            call(
                "write", uri, lambda: _client().abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
            )  # fmt: skip
        raise


def _put_part(uri: str, upload_id: str, number: int, data: bytes) -> "CompletedPartTypeDef":
    bucket, key = split(uri)
    done = call(
        "write", uri,
        lambda: _client().upload_part(Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=data),
    )  # fmt: skip
    return {"PartNumber": number, "ETag": done["ETag"]}


def create(uri: str, data: bytes) -> None:
    """Write by If-None-Match. PreconditionError if the object exists, perhaps by a write of ours whose answer was lost."""
    bucket, key = split(uri)
    call("write", uri, lambda: _client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*"))


def replace(uri: str, data: bytes, *, etag: str) -> None:
    """Write by If-Match. PreconditionError or ObjectMissingError if the object is not as `etag` says."""
    bucket, key = split(uri)
    call("write", uri, lambda: _client().put_object(Bucket=bucket, Key=key, Body=data, IfMatch=f'"{etag}"'))


def _get(uri: str, last_bytes: int | None) -> tuple[bytes, str]:
    bucket, key = split(uri)
    if not key:
        raise missing("read", uri)
    if last_bytes is None:
        found = _client().get_object(Bucket=bucket, Key=key)
    else:
        try:
            found = _client().get_object(Bucket=bucket, Key=key, Range=f"bytes=-{last_bytes}")
        except botocore.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") != "InvalidRange":
                raise
            found = _client().get_object(Bucket=bucket, Key=key)  # an empty object has no range
    return found["Body"].read(), found["ETag"].strip('"')


async def fetch(uri: str) -> tuple[bytes, str]:
    bucket, key = split(uri)
    if not _obstore_keeps(key):
        return await asyncio.to_thread(get, uri)
    store = _stores.get(bucket) or await asyncio.to_thread(_obstore, bucket)  # which asks the store for the region
    try:
        found = await obstore.get_async(store, key)
        return bytes(await found.bytes_async()), (found.meta["e_tag"] or "").strip('"')
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise no_bucket("read", uri) from error
        raise missing("read", uri) from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        code = re.search(r"<Code>(\w+)</Code>", str(error))
        raise denied("read", uri, code[1] if code else "AccessDenied") from error
    except (BaseError, OSError) as error:
        raise StorageError(f"cannot read {uri}: {first_line(error)}") from error


def arrow_filesystem(uri: str) -> fs.S3FileSystem:
    """A pyarrow file system with boto3's endpoint and its credentials of now, for the bucket of `uri`."""
    client, found = _client(), boto3.Session().get_credentials()
    if found is None:
        raise CredentialsError(
            f"cannot read {uri}: no AWS credentials found: set AWS_PROFILE, or run where a role is attached"
        )
    keys = found.get_frozen_credentials()
    scheme, _, host = client.meta.endpoint_url.partition("://")
    return fs.S3FileSystem(
        access_key=keys.access_key,
        secret_key=keys.secret_key,
        session_token=keys.token,
        region=call("find", uri, lambda: _region(split(uri)[0])),
        scheme=scheme,
        endpoint_override=None if _is_aws(client.meta.endpoint_url) else host,
    )


def forget_clients() -> None:
    """Read the AWS_* variables anew at the next operation."""
    _client.cache_clear()
    _stores.clear()
    _failures.clear()


def _obstore_keeps(key: str) -> bool:
    """Whether obstore's normalised path equals the key byte for byte (`a//b`, `./x`, `/lead`, `dir/`, control characters do not)."""
    return key.isprintable() and all(part not in ("", ".", "..") for part in key.split("/"))


@functools.cache
def _client() -> "S3Client":
    client = boto3.Session().client(
        "s3",
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"mode": "standard", "total_max_attempts": 1},  # `call` tries again, within a time
            max_pool_connections=64,
        ),
    )
    listing_answer.register(client.meta.events)
    return client


_stores: dict[str, S3Store] = {}
_failures: dict[str, tuple[float, StorageError]] = {}  # bucket -> when it could not be opened, and why
_opening = threading.Lock()


def _obstore(bucket: str) -> S3Store:
    """One store per bucket, with boto3's credentials and endpoint, and the bucket's own region."""
    asked_s = time.monotonic()
    with _opening:  # many images ask for the first time at once: one tries, for all that wait
        failed_s, error = _failures.get(bucket, (-math.inf, None))
        if error is not None and failed_s > asked_s:
            raise error
        if bucket not in _stores:
            try:
                _stores[bucket] = _open_obstore(bucket)
            except StorageError as failure:
                _failures[bucket] = time.monotonic(), failure
                raise
        return _stores[bucket]


def _open_obstore(bucket: str) -> S3Store:
    client = _client()
    endpoint = client.meta.endpoint_url
    is_aws = _is_aws(endpoint)
    region = call("find", f"s3://{bucket}", lambda: _region(bucket))
    return S3Store(
        bucket,
        region=region,
        endpoint=None if is_aws else endpoint,  # pyright: ignore[reportArgumentType]  None is as good as absent
        credential_provider=Boto3CredentialProvider(boto3.Session()),
        client_options={
            "allow_http": not is_aws and endpoint.startswith("http://"),
            "connect_timeout": f"{CONNECT_TIMEOUT_S}s",
            "timeout": f"{FETCH_TIMEOUT_S}s",
        },
        retry_config={
            "max_retries": 20,
            "retry_timeout": timedelta(seconds=RETRY_S),
            "backoff": {
                "init_backoff": timedelta(seconds=FIRST_WAIT_S),
                "max_backoff": timedelta(seconds=LONGEST_WAIT_S),
                "base": 2,
            },
        },
    )


def _is_aws(endpoint: str) -> bool:
    return endpoint.removesuffix("/").endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _region(bucket: str) -> str:
    """The bucket's own region, which S3 tells even to those who may not list it; else the configured one."""
    try:
        found = _client().head_bucket(Bucket=bucket).get("BucketRegion")
    except botocore.exceptions.ClientError as error:
        answer = error.response.get("ResponseMetadata")
        if answer is None or answer["HTTPStatusCode"] != 403:
            raise
        found = answer["HTTPHeaders"].get("x-amz-bucket-region")
    return found or _client().meta.region_name
