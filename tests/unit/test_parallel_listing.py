"""Parallel listing against serial listing: in memory with any keys, by moto with awkward ones, by SeaweedFS, which has its own order."""

import os
import random
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import boto3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from dragonclf import storage
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.storage import parallel_listing, s3
from dragonclf.storage.key_space import KeySpace
from dragonclf.storage.listing_answer import read_objects
from dragonclf.storage.parallel_listing import Page, list_entries
from tests.conftest import use_identity

PREFIX = "p/"
ANY_KEY = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
ALIKE_KEY = st.text(st.sampled_from("01a/-\0\U0010ffff\ud7ff\ue000"), max_size=12)


class Bucket:
    """ListObjectsV2 in memory: by `order`, StartAfter exclusive, whether it names a key or not."""

    def __init__(
        self, keys: list[str], *, page_keys: int = 3, latency_s: float = 0.0, order: Callable[[str], object] = str,
        fail_after: int | None = None,
    ):  # fmt: skip
        self.order, self.keys = order, sorted({PREFIX + key for key in keys}, key=order)  # pyright: ignore[reportArgumentType, reportCallIssue]
        self.page_keys, self.latency_s, self.fail_after = page_keys, latency_s, fail_after
        self.num_requests = self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def __call__(self, *, start_after: str | None = None, token: str | None = None) -> Page:
        with self._lock:
            self.num_requests += 1
            if self.fail_after is not None and self.num_requests > self.fail_after:
                raise storage.AccessDeniedError("cannot list s3://b/p: access denied")
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.latency_s)
        with self._lock:
            self.at_once -= 1
        start = 0
        if token is not None:
            start = int(token)
        elif start_after is not None:
            assert len(start_after.encode()) <= 1024
            start = bisect_right(self.keys, self.order(start_after), key=self.order)  # pyright: ignore[reportCallIssue, reportArgumentType]
        page = self.keys[start : start + self.page_keys]
        stop = start + len(page)
        return Page([(key, f"etag of {key}", stop) for key in page], str(stop) if stop < len(self.keys) else None)


def folder_by_folder(key: str) -> object:
    """The order of a store that walks folders: `a/z` before `a-b`."""
    return key.split("/")


def listed(bucket: Bucket, num_requests: int = 8) -> list[str]:
    return [key for key, _, _ in list_entries(bucket, PREFIX, num_requests=num_requests)]


def num_threads() -> int:
    return sum(thread.name.startswith("dragonclf-listing") for thread in threading.enumerate())


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(ANY_KEY, ALIKE_KEY, st.integers(0, 10**6).map(str)), max_size=60), st.integers(1, 7), st.integers(1, 8)
)  # fmt: skip
def test_it_is_the_serial_listing_whatever_the_keys(keys: list[str], page_keys: int, num_requests: int):
    bucket = Bucket(keys, page_keys=page_keys)
    found = list(list_entries(bucket, PREFIX, num_requests=num_requests))
    assert [key for key, _, _ in found] == bucket.keys
    assert all(etag == f"etag of {key}" for key, etag, _ in found)
    assert num_threads() == 0


@settings(max_examples=300, deadline=None)
@given(st.lists(ALIKE_KEY, min_size=1, max_size=20), ALIKE_KEY, ALIKE_KEY)
def test_a_cut_lies_between_its_bounds(seen: list[str], one: str, other: str):
    space = KeySpace("")
    space.learn(sorted(seen))
    low, high = min(one, other), max(one, other)
    for end in (high, None):
        cut = space.middle(low, end) if low != end else None
        assert cut is None or (low < cut and (end is None or cut < end))
        for beginning in space.beginnings(min(seen), low, end, count=4) if low != end and min(seen) <= low else []:
            assert low < beginning
            assert end is None or beginning < end


def test_one_page_costs_one_request():
    bucket = Bucket(["a", "b", "c"])
    assert (listed(bucket), bucket.num_requests) == (["p/a", "p/b", "p/c"], 1)
    assert (listed(Bucket([])), num_threads()) == ([], 0)


@pytest.mark.parametrize(
    "name", [lambda i: f"img_{i:08d}.jpg", lambda i: f"{random.Random(i).getrandbits(64):016x}.jpg"]
)
def test_a_flat_prefix_is_listed_by_many_requests_at_once(name: Callable[[int], str]):
    """benchmarks/listing.py tells how fast that is."""
    bucket = Bucket([name(i) for i in range(4000)], page_keys=10, latency_s=0.05)
    assert listed(bucket, parallel_listing.NUM_REQUESTS) == bucket.keys
    assert bucket.most_at_once > parallel_listing.NUM_REQUESTS / 2
    assert bucket.num_requests < 3 * 400


def test_pages_ahead_of_a_slow_consumer_wait_in_files_and_leave_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bucket = Bucket([f"{i:05d}" for i in range(3000)], page_keys=10)
    entries = list_entries(bucket, PREFIX)
    first = list(islice(entries, 15))
    deadline, waiting = time.monotonic() + 30, 0
    while waiting < 2990 and time.monotonic() < deadline:
        time.sleep(0.05)
        waiting = sum(path.read_bytes().count(b"etag of") for path in tmp_path.rglob("*") if path.is_file())
    assert waiting == 2990
    assert [key for key, _, _ in [*first, *entries]] == bucket.keys
    assert list(tmp_path.iterdir()) == []


def test_a_consumer_that_stops_leaves_no_thread_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    entries = list_entries(Bucket([f"{i:05d}" for i in range(3000)], latency_s=0.01), PREFIX)
    assert len(list(islice(entries, 20))) == 20
    assert (num_threads() > 0, len(os.listdir(tmp_path))) == (True, 1)
    entries.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert (num_threads(), os.listdir(tmp_path)) == (0, [])


@pytest.mark.parametrize("fail_after", [0, 1, 2, 5, 40])
def test_an_error_ends_it_as_storage_raised_it(fail_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(storage.AccessDeniedError, match="cannot list s3://b/p: access denied"):
        listed(Bucket([f"{i:05d}" for i in range(1000)], fail_after=fail_after))
    assert (num_threads(), os.listdir(tmp_path)) == (0, [])


# --- stores with an order of their own


def test_a_first_page_out_of_order_means_a_serial_listing():
    bucket = Bucket(["a-b", "a/y", "a/z", "b", *(f"c{i:03d}" for i in range(60))], order=folder_by_folder)
    assert listed(bucket) == bucket.keys
    assert bucket.keys[:3] == ["p/a/y", "p/a/z", "p/a-b"]
    assert bucket.num_requests == 22


@pytest.mark.parametrize("order", [folder_by_folder, str.lower], ids=["folders", "case"])
def test_a_later_page_out_of_order_gives_each_key_once(order: Callable[[str], object]):
    keys = [f"a{i:03d}" for i in range(100)] + [f"b-{i}" for i in range(9)] + [f"b/{i}" for i in range(9)] + ["B1", "Z"]
    bucket = Bucket(keys, page_keys=10, order=order)
    assert sorted(listed(bucket)) == sorted(bucket.keys)


def test_a_store_that_ignores_start_after_is_listed_serially():
    class Ignorant(Bucket):
        def __call__(self, *, start_after: str | None = None, token: str | None = None) -> Page:
            return super().__call__(token=token)

    bucket = Ignorant([f"{i:04d}" for i in range(200)])
    assert listed(bucket) == bucket.keys


def test_a_store_that_takes_a_folders_name_for_what_is_behind_it_is_found_out():
    """As SeaweedFS does: StartAfter=`p/d` leaves out all of `p/d/`."""

    class Behind(Bucket):
        def __call__(self, *, start_after: str | None = None, token: str | None = None) -> Page:
            if start_after and any(key.startswith(f"{start_after}/") for key in self.keys):
                start_after += "0"
            return super().__call__(start_after=start_after, token=token)

    bucket = Behind([f"d{i % 4}/{i:04d}" for i in range(200)])
    assert listed(bucket) == bucket.keys
    assert bucket.num_requests > 200 / 3


def test_seaweedfs_is_listed_serially(s3_env: LocalS3, monkeypatch: pytest.MonkeyPatch):
    keys = [
        "a-b.jpg",
        "a.jpg",
        "a/z.jpg",
        *(f"{folder}/{i}.jpg" for folder in ("b", "b2", "c/d", "c/e") for i in range(12)),
    ]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: storage.put(f"s3://work/ordered/{key}", b"x"), keys))
    whole = [found.uri for found in storage.list_objects("s3://work/ordered")]
    monkeypatch.setattr(s3, "PAGE_KEYS", 4)
    monkeypatch.setattr(parallel_listing, "_Parallel", None)
    found = [found.uri for found in storage.list_objects("s3://work/ordered")]
    assert found == whole
    assert sorted(found) == sorted(f"s3://work/ordered/{key}" for key in keys)
    assert found != sorted(found), "the store's order is not that of bytes"


# --- moto


@pytest.fixture
def moto(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An endpoint that lists by bytes, with a bucket `awkward` (moto keeps buckets for as long as the process)."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        use_identity(
            {
                "AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "k",
                "AWS_SECRET_ACCESS_KEY": "s",
            },
            monkeypatch,
        )  # fmt: skip
        s3._client().create_bucket(Bucket="awkward")
        yield endpoint
    finally:
        server.stop()
        s3.forget_clients()


def awkward_keys() -> list[str]:
    rng = random.Random(0)
    odd = " !\"#$%&'()*+,;<=>?@[\\]^`{|}~\t\u00a0é日😀\U0010fffd"
    keys = ["", "a//b", "/lead", "//", "dir/", "x" * 1022, "é" * 511, "plus+and&=.jpg", "per%2Fcent", "q\"'uote"]
    keys += ["".join(rng.choices("abc/-. " + odd, k=rng.randint(1, 12))) for _ in range(300)]
    keys += [f"flat/{i:05d}.jpg" for i in range(300)]
    return sorted({f"in/{key}" for key in keys})


def test_awkward_keys_by_small_pages(moto: str, monkeypatch: pytest.MonkeyPatch):
    keys = awkward_keys()
    client = s3._client()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: client.put_object(Bucket="awkward", Key=key, Body=key.encode()), keys))
    monkeypatch.setattr(s3, "PAGE_KEYS", 10)
    found = list(storage.list_objects("s3://awkward/in"))
    assert [info.uri for info in found] == [f"s3://awkward/{key}" for key in keys]
    assert [info.size for info in found] == [len(key.encode()) for key in keys]
    assert [info.uri for info in storage.list_objects("s3://awkward/in/flat")] == [
        f"s3://awkward/in/flat/{i:05d}.jpg" for i in range(300)
    ]
    assert num_threads() == 0
    plain = boto3.client("s3").list_objects_v2(Bucket="awkward", Prefix="in/", MaxKeys=100)
    ours = s3._client().list_objects_v2(Bucket="awkward", Prefix="in/", MaxKeys=100)
    assert [(item.get("Key"), item.get("ETag"), item.get("Size")) for item in ours.get("Contents", [])] == [
        (item.get("Key"), item.get("ETag"), item.get("Size")) for item in plain.get("Contents", [])
    ]
    assert (ours.get("IsTruncated"), ours.get("KeyCount")) == (True, 100)


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ("<Contents><Key>a</Key><ETag>&quot;e&quot;</ETag><Size>1</Size></Contents>", [{"Key": "a", "ETag": '"e"', "Size": 1}]),
        ("<Contents>\n<Size>1</Size> <ETag>e</ETag><Owner/><Key>a</Key></Contents>", [{"Key": "a", "ETag": "e", "Size": 1}]),
        ("", None),
        ("<Contents><Key>a&amp;b</Key><ETag>e</ETag><Size>1</Size></Contents>", None),
        ("<Contents><Key><![CDATA[a]]></Key><ETag>e</ETag><Size>1</Size></Contents>", None),
        ("<Contents><Key>a</Key><ETag/><Size>1</Size></Contents>", None),
        ("<Contents><Key>a</Key><Key>b</Key><Size>1</Size></Contents>", None),
        ("<x:Contents><x:Key>a</x:Key><x:ETag>e</x:ETag><x:Size>1</x:Size></x:Contents>", None),
        ("<Contents><Key>a</Key><ETag>e</ETag><Size>1</Size></Contents><x:Contents></x:Contents>", None),
    ],
)  # fmt: skip
def test_an_answer_is_read_plain_or_left_to_botocore(contents: str, expected: list[dict[str, object]] | None):
    read = read_objects(f"<L><IsTruncated>true</IsTruncated>{contents}<KeyCount>1</KeyCount></L>".encode())
    assert read == (
        (expected, b"<L><IsTruncated>true</IsTruncated><KeyCount>1</KeyCount></L>") if expected is not None else None
    )
