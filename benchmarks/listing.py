"""Parallel against serial listing of a flat prefix behind 100 ms a page, and memory at a million keys and more.

Usage: python benchmarks/listing.py [NUM_KEYS ...]

By HTTP: a server in a process of its own answers ListObjectsV2 as S3 does, 100 ms late; the client is `storage.list_objects`, and serial
is the same code kept from cutting. It shares the CPUs with the server, which has its answers ready, so few of them bound the ratio. From
memory: the same without HTTP, signatures and XML, where serial is 100 ms a page. Memory: peak of a process that lists keys which are
made as they are asked for.
"""

import concurrent.futures
import http.server
import itertools
import multiprocessing
import os
import resource
import sys
import time
import urllib.parse
from bisect import bisect_right
from collections.abc import Callable
from multiprocessing.connection import Connection
from xml.sax.saxutils import escape

from dragonclf import storage
from dragonclf.storage import parallel_listing, s3
from dragonclf.storage.parallel_listing import Page, list_entries

LATENCY_S = 0.1
PAGE_KEYS = 1000
ETAG = "d41d8cd98f00b204e9800998ecf8427e"
MEMORY_KEYS = [100_000, 1_000_000, 3_000_000]

NAMES: dict[str, Callable[[int], str]] = {
    "numbers": lambda i: f"p/img_{i:08d}.jpg",
    "hashes": lambda i: f"p/{i * 0x9E3779B97F4A7C15 % 2**64:016x}.jpg",
    "dates": lambda i: f"p/2026/{1 + i % 12:02d}/{1 + i % 28:02d}/IMG_{i:07d}.jpg",
}


def serve(name: str, num_keys: int, ready: Connection) -> None:
    """Answer ListObjectsV2, LATENCY_S after it was asked, until killed."""
    keys = sorted(NAMES[name](i) for i in range(num_keys))
    entries = [  # made beforehand: the client has the CPUs then, as with a store elsewhere
        f"<Contents><Key>{urllib.parse.quote(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{ETAG}&quot;</ETag><Size>123456</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for key in keys
    ]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            due = time.monotonic() + LATENCY_S
            query = dict(urllib.parse.parse_qsl(self.path.partition("?")[2]))
            after = query.get("continuation-token") or query.get("start-after")
            start = bisect_right(keys, after) if after else 0
            end = min(start + PAGE_KEYS, len(keys))
            more = end < len(keys)
            token = f"<NextContinuationToken>{escape(keys[end - 1])}</NextContinuationToken>" if more else ""
            body = (
                '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
                f"<EncodingType>url</EncodingType><KeyCount>{end - start}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>"
                f"{token}{''.join(entries[start:end])}</ListBucketResult>"
            ).encode()
            time.sleep(max(0.0, due - time.monotonic()))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.request_queue_size = 128
    ready.send(server.server_address[1])
    server.serve_forever()


def seconds(num_keys: int, *, is_parallel: bool) -> float:
    """Time to list `s3://photos/p`, checked."""
    cut, started = parallel_listing.is_ordered, time.perf_counter()
    try:
        if not is_parallel:
            parallel_listing.is_ordered = lambda keys: False
        last, count = "", 0
        for found in storage.list_objects("s3://photos/p"):
            assert found.uri > last
            last, count = found.uri, count + 1
    finally:
        parallel_listing.is_ordered = cut
    assert count == num_keys
    return time.perf_counter() - started


def measure_speed(name: str, num_keys: int) -> tuple[float, float]:
    """Seconds of a serial and of a parallel listing."""
    here, there = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(name, num_keys, there), daemon=True)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{here.recv()}", "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
    }  # fmt: skip
    s3.forget_clients()
    try:
        next(storage.list_objects("s3://photos/p"))  # boto3 has loaded its models
        return seconds(num_keys, is_parallel=False), seconds(num_keys, is_parallel=True)
    finally:
        server.kill()
        server.join()


def measure_from_memory(name: str, num_keys: int) -> tuple[float, int]:
    """(seconds, requests) of a parallel listing of keys in memory, LATENCY_S a page."""
    keys, requests = sorted(NAMES[name](i) for i in range(num_keys)), itertools.count()

    def list_page(*, start_after: str | None = None, token: str | None = None) -> Page:
        next(requests)
        after = token or start_after
        start = bisect_right(keys, after) if after else 0
        time.sleep(LATENCY_S)
        page = keys[start : start + PAGE_KEYS]
        return Page([(key, ETAG, 123456) for key in page], page[-1] if start + PAGE_KEYS < num_keys else None)

    started = time.perf_counter()
    assert [key for key, _, _ in list_entries(list_page, "p/")] == keys
    return time.perf_counter() - started, next(requests)


def measure_memory(num_keys: int) -> tuple[float, float, float]:
    """(seconds, peak resident MiB, MiB of it before) of listing keys that are made when they are asked for."""

    def list_page(*, start_after: str | None = None, token: str | None = None) -> Page:
        after = token or start_after
        start = 0
        if after is not None:  # img_%08d.jpg, so a key's number is found without holding the keys
            low, high = 0, num_keys
            while low < high:
                middle = (low + high) // 2
                low, high = (middle + 1, high) if NAMES["numbers"](middle) <= after else (low, middle)
            start = low
        keys = [NAMES["numbers"](i) for i in range(start, min(start + PAGE_KEYS, num_keys))]
        return Page([(key, ETAG, 123456) for key in keys], keys[-1] if start + PAGE_KEYS < num_keys else None)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    assert sum(1 for _ in list_entries(list_page, "p/")) == num_keys
    return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, before


def main() -> None:
    counts = [int(value) for value in sys.argv[1:]] or [60_000, 300_000]
    print(
        f"{os.cpu_count()} CPUs, {LATENCY_S * 1000:.0f} ms a page of {PAGE_KEYS:,} keys, {parallel_listing.NUM_REQUESTS} requests at once"
    )
    print(f"{'keys':>8} {'named by':>9} {'serial s':>9} {'parallel s':>11} {'ratio':>6}")
    for num_keys, name in itertools.product(counts, NAMES):
        serial, parallel = measure_speed(name, num_keys)
        print(f"{num_keys:>8,} {name:>9} {serial:>9.2f} {parallel:>11.2f} {serial / parallel:>6.1f}", flush=True)
    print(f"{'keys':>8} {'named by':>9} {'from memory s':>14} {'ratio':>6} {'requests':>9} {'pages':>6}")
    for num_keys, name in itertools.product(counts, NAMES):
        (took, requests), pages = measure_from_memory(name, num_keys), -(-num_keys // PAGE_KEYS)
        print(
            f"{num_keys:>8,} {name:>9} {took:>14.2f} {pages * LATENCY_S / took:>6.1f} {requests:>9} {pages:>6}",
            flush=True,
        )
    print(f"{'keys':>10} {'seconds':>8} {'peak MiB':>9} {'MiB before':>11}")
    for num_keys in MEMORY_KEYS:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as child:
            took, peak, before = child.submit(measure_memory, num_keys).result()
        print(f"{num_keys:>10,} {took:>8.1f} {peak:>9.0f} {before:>11.0f}", flush=True)


if __name__ == "__main__":
    main()
