"""The cache of images on a training node's disk."""

import asyncio
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from dragonclf import storage
from dragonclf.data import images
from dragonclf.data.transforms import Transform
from dragonclf.train import cache
from dragonclf.train.cache import ImageCache
from dragonclf.train.data import MAX_FETCHES, Images
from tests.conftest import encoded

HALF = (0.5, 0.5, 0.5)
TRANSFORM = Transform(size=32, crop_pct=0.875, interpolation="bilinear", mean=HALF, std=HALF, min_side=72)
Usage = namedtuple("Usage", "total used free")


class Bucket:
    """Stands in for S3: objects in memory, and how often each was read."""

    def __init__(self, objects: dict[str, bytes], monkeypatch: pytest.MonkeyPatch):
        self.objects, self.reads = objects, dict.fromkeys(objects, 0)
        self.num_fetches = self.most_fetches = 0  # at one time
        monkeypatch.setattr(storage, "fetch", self.fetch)
        monkeypatch.setattr(storage, "get", self.get)

    async def fetch(self, uri: str) -> tuple[bytes, str]:
        self.num_fetches += 1
        self.most_fetches = max(self.most_fetches, self.num_fetches)
        await asyncio.sleep(0.01)
        self.num_fetches -= 1
        return self.get(uri), ""

    def get(self, uri: str) -> bytes:
        if uri not in self.objects:
            raise storage.ObjectMissingError(f"there is no {uri}")
        self.reads[uri] += 1
        return self.objects[uri]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    sizes = [(40, 30), (300, 200), (700, 500)]
    return Bucket({f"s3://b/{i}.jpg": encoded(size=size, seed=i) for i, size in enumerate(sizes)}, monkeypatch)


def samples(bucket: Bucket, store: ImageCache | None, *, seed: int | None) -> Images:
    import hashlib

    digests = [hashlib.sha256(data).hexdigest() for data in bucket.objects.values()]
    table = pa.table({"uri": list(bucket.objects), "label": ["a"] * len(digests), "sha256": digests})
    return Images(table, ["a", "b"], TRANSFORM, num_threads=2, seed=seed, cache=store)


def read(of: Images, epoch: int) -> torch.Tensor:
    return torch.cat([inputs for inputs, _ in of.batches([np.arange(len(of))], epoch=epoch)])


@pytest.mark.parametrize("seed", [None, 0])
def test_each_image_is_read_once_and_the_pixels_stay(seed: int | None, bucket: Bucket, tmp_path: Path):
    uncached = [read(samples(bucket, None, seed=seed), epoch) for epoch in range(3)]
    assert set(bucket.reads.values()) == {3}
    of = samples(bucket, ImageCache(tmp_path), seed=seed)
    cached = [read(of, epoch) for epoch in range(3)]
    assert set(bucket.reads.values()) == {4}
    assert all(torch.equal(a, b) for a, b in zip(uncached, cached, strict=True))
    assert torch.equal(read(samples(bucket, ImageCache(tmp_path), seed=seed), 1), uncached[1])  # a later run
    assert set(bucket.reads.values()) == {4}


def test_images_are_read_while_others_are_decoded_but_not_too_many(monkeypatch: pytest.MonkeyPatch):
    bucket = Bucket({f"s3://b/{i}.jpg": encoded(seed=i) for i in range(100)}, monkeypatch)
    read(samples(bucket, None, seed=0), 0)
    assert 10 < bucket.most_fetches <= MAX_FETCHES  # by two decoding threads


@pytest.mark.parametrize("seed", [None, 0])
def test_an_image_that_is_gone_is_named(seed: int | None, bucket: Bucket, tmp_path: Path):
    of = samples(bucket, ImageCache(tmp_path), seed=seed)
    del bucket.objects["s3://b/1.jpg"]
    with pytest.raises(
        ValueError, match=r"s3://b/1\.jpg was usable when .*there is no s3://b/1\.jpg.*index the images again"
    ):
        read(of, 0)


def test_large_images_are_kept_smaller(bucket: Bucket, tmp_path: Path):
    read(samples(bucket, ImageCache(tmp_path), seed=0), 0)
    kept = sorted(tmp_path.glob("*/*"), key=lambda path: path.stat().st_size)
    small, middle, large = (bucket.objects[f"s3://b/{i}.jpg"] for i in range(3))
    decoded = {path.read_bytes(): images.decode(path.read_bytes()).shape for path in kept}
    assert decoded[small] == (3, 30, 40)
    assert small in decoded
    assert middle not in decoded
    assert large not in decoded
    assert sorted(min(shape[1:]) for shape in decoded.values()) == [30, 72, 72]


def test_a_reduced_image_is_the_image():
    data = encoded(size=(700, 500))
    small = images.decode(images.reduced(data, min_side=100)).float()
    assert small.shape == (3, 100, 140)
    expected = torch.nn.functional.interpolate(images.decode(data)[None].float(), (100, 140), mode="area")[0]
    assert (small - expected).abs().mean() < 3
    assert images.reduced(data, min_side=251) is data
    assert images.reduced(b"none", min_side=10) == b"none"


def test_a_damaged_entry_is_read_again(bucket: Bucket, tmp_path: Path):
    for seed in (None, 0):
        whole = read(samples(bucket, ImageCache(tmp_path), seed=seed), 0)
        before = dict(bucket.reads)
        for path in tmp_path.glob("*/*"):
            path.write_bytes(path.read_bytes()[:50])
        assert torch.equal(read(samples(bucket, ImageCache(tmp_path), seed=seed), 0), whole)
        assert bucket.reads == {uri: count + 1 for uri, count in before.items()}
        assert torch.equal(read(samples(bucket, ImageCache(tmp_path), seed=seed), 0), whole)
        assert bucket.reads == {uri: count + 1 for uri, count in before.items()}


@pytest.mark.parametrize("cached", [True, False])
def test_another_image_in_its_place_is_refused(cached: bool, bucket: Bucket, tmp_path: Path):
    of = samples(bucket, ImageCache(tmp_path) if cached else None, seed=0)
    bucket.objects["s3://b/1.jpg"] = encoded(seed=9)
    with pytest.raises(
        ValueError, match=r"s3://b/1\.jpg was usable when .*changed: another image is there now.*index the images again"
    ):
        read(of, 0)


def test_the_folder_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ImageCache(tmp_path / "new" / "cache")
    assert (tmp_path / "new" / "cache").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ValueError, match=r"belongs to another user: choose another --cache-dir"):
        ImageCache(tmp_path / "new" / "cache")
    assert cache.user_folder().name == "dragonclf-cache-12345"


def test_a_full_disk_takes_no_more_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    store = ImageCache(tmp_path)
    store.put("aa1", b"first")
    monkeypatch.setattr(cache, "CHECKED_EVERY", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 950, 50))
    for name in ("aa2", "aa3"):
        store.put(name, b"more")
    assert (store.get("aa1"), store.get("aa2"), store.get("aa3")) == (b"first", None, None)
    assert caplog.text.count("90% full") == 1


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = ImageCache(tmp_path)
    for number, name in enumerate(("aa1", "bb2", "cc3", "dd4")):
        store.put(name, b"x")
        os.utime(tmp_path / name[:2] / name, (number, number))
    assert store.get("aa1") == b"x"  # used just now
    monkeypatch.setattr(cache, "CHECKED_EVERY", 1)
    kept = lambda: sorted(path.name for path in tmp_path.glob("??/*"))  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 0, 14 - 2 * len(kept())))
    ImageCache(tmp_path)  # 10 % of 100 have to be free: two entries
    assert kept() == ["aa1", "dd4"]


def test_writers_of_one_entry_leave_it_whole(tmp_path: Path):
    store, data = ImageCache(tmp_path), [bytes([i]) * 200_000 for i in range(8)]
    threads = [threading.Thread(target=store.put, args=("ab", item)) for item in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get("ab") in data
    assert [path.name for path in tmp_path.iterdir()] == ["ab"]
