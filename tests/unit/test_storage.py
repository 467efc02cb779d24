"""Storage: one contract, held by local paths and by a real S3 server; then what each does in its own way."""

import asyncio
import contextlib
import http.server
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

from dragonclf import storage
from dragonclf.demo.local_s3 import LocalS3
from dragonclf.storage import s3
from tests.conftest import use_identity

HOSTILE = [
    "plain.jpg", "with space.jpg", "hash#1.jpg", "what?.jpg", "slash%2F.jpg", "percent%.jpg", "plus+and&=.jpg", "tilde~*'().jpg",
    "quote\".jpg", "new\nline.jpg", "tab\t.jpg", "été 日本 😀.jpg", "e\u0301.jpg", "no\u00a0break.jpg", "{}[]|^`<>.jpg",
    ".hidden", "a:b@c;d,e.jpg",
]  # fmt: skip


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder or prefix."""
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("s3_env")
    return f"s3://work/{tmp_path.parent.name}/{tmp_path.name}"


def fetch(uri: str) -> tuple[bytes, str]:
    async def read() -> tuple[bytes, str]:
        return await storage.fetch(uri)

    return asyncio.run(read())


def test_hostile_keys_round_trip_by_every_way_of_reading(root: str):
    for name in HOSTILE:
        storage.put(f"{root}/in/{name}", name.encode())
    listed = {found.uri: found for found in storage.list_objects(f"{root}/in")}
    assert sorted(listed) == sorted(f"{root}/in/{name}" for name in HOSTILE)
    for name in HOSTILE:
        uri = f"{root}/in/{name}"
        content, etag = fetch(uri)
        assert content == storage.get(uri) == name.encode()
        assert listed[uri] == storage.stat(uri) == storage.ObjectInfo(uri, etag, len(content))
        assert storage.get_if_exists(uri) == (content, etag)


def test_a_prefix_is_a_folder(root: str):
    for key in ("cats/1.jpg", "cats/deep/er/2.jpg", "cats2/3.jpg", "cats.jpg"):
        storage.put(f"{root}/{key}", b"x")
    expected = [f"{root}/cats/1.jpg", f"{root}/cats/deep/er/2.jpg"]
    for prefix in (f"{root}/cats", f"{root}/cats/"):
        assert [found.uri for found in storage.list_objects(prefix)] == expected


def test_put_if_absent_keeps_the_first_and_repeats_idempotently(root: str):
    uri = f"{root}/claim"
    assert [storage.put_if_absent(uri, data) for data in (b"mine", b"mine", b"other", b"mine")] == [
        True,
        True,
        False,
        True,
    ]
    assert storage.get(uri) == b"mine"


def test_put_if_absent_lets_one_of_racing_writers_win(root: str):
    for attempt in range(3):
        uri = f"{root}/race-{attempt}"
        won = together(4, lambda i, uri=uri: storage.put_if_absent(uri, f"writer {i}".encode()))
        assert won.count(True) == 1
        assert storage.get(uri) == f"writer {won.index(True)}".encode()


def test_put_if_match_replaces_only_what_was_read(root: str):
    uri = f"{root}/pointer"
    storage.put(uri, b"a")
    [_, first] = storage.get_if_exists(uri) or pytest.fail("it was just written")
    assert storage.put_if_match(uri, b"b", first)
    assert not storage.put_if_match(uri, b"c", first)
    assert storage.put_if_match(uri, b"b", first), "what is asked for is already there"
    assert storage.get(uri) == b"b"
    assert not storage.put_if_match(f"{root}/none", b"x", first)
    assert storage.stat(f"{root}/none") is None


def test_put_if_match_loses_no_update_of_racing_writers(root: str):
    uri = f"{root}/counter"
    # The content carries the writer, so that "it holds my data already" can never stand for someone else's update.
    storage.put(uri, b"0000-0")

    def increment(_: int) -> None:
        while True:
            found = storage.get_if_exists(uri)
            assert found is not None
            count = int(found[0].split(b"-")[0]) + 1
            if storage.put_if_match(uri, b"%04d-%d" % (count, threading.get_ident()), found[1]):
                return

    together(4, lambda i: [increment(i) for _ in range(5)])
    assert storage.get(uri).startswith(b"0020-")


def test_last_bytes(root: str):
    storage.put(f"{root}/ten", b"0123456789")
    storage.put(f"{root}/empty", b"")
    assert [storage.get(f"{root}/ten", last_bytes=n) for n in (3, 10, 99)] == [b"789", b"0123456789", b"0123456789"]
    assert storage.get(f"{root}/empty", last_bytes=8) == b""


def test_a_download_is_the_object(root: str, tmp_path: Path):
    data = bytes(range(256)) * 10_000
    storage.put(f"{root}/in/x", data)
    storage.download(f"{root}/in/x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    with pytest.raises(storage.ObjectMissingError, match=r"cannot read .*/in/none: it does not exist"):
        storage.download(f"{root}/in/none", tmp_path / "none")


def test_a_missing_object(root: str):
    uri = f"{root}/no such.jpg"
    for read in (storage.get, fetch):
        with pytest.raises(storage.ObjectMissingError, match=r"cannot read .*no such.jpg: it does not exist"):
            read(uri)
    assert storage.get_if_exists(uri) is None
    assert storage.stat(uri) is None


def test_put_replaces_and_changes_the_etag(root: str):
    uri = f"{root}/x"
    storage.put(uri, b"one")
    first = storage.stat(uri)
    storage.put(uri, b"three")
    second = storage.stat(uri)
    assert first is not None
    assert second is not None
    assert (first.etag != second.etag, second.size, storage.get(uri)) == (True, 5, b"three")


def test_put_file_replaces_the_object_with_the_files_content(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)  # the least that S3 takes
    path = tmp_path / "file"
    for num_bytes in (0, 3, 5 * 2**20, 12 * 2**20 + 1):  # on S3 in 1, 1, 1 and 3 requests
        content = os.urandom(num_bytes)
        path.write_bytes(content)
        storage.put_file(f"{root}/out/x", path)
        assert storage.get(f"{root}/out/x") == content
    assert [storage.name(found.uri) for found in storage.list_objects(f"{root}/out")] == ["x"]


def test_s3_put_file_that_fails_half_way_changes_nothing(
    s3_env: LocalS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    uri, path, put_part = "s3://work/half/x", tmp_path / "file", s3._put_part
    storage.put(uri, b"before")
    path.write_bytes(os.urandom(11 * 2**20))
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)

    def fail_at_the_second(uri: str, upload_id: str, number: int, data: bytes):
        if number == 2:
            raise storage.StorageError("the network is gone")
        return put_part(uri, upload_id, number, data)

    monkeypatch.setattr(s3, "_put_part", fail_at_the_second)
    with pytest.raises(storage.StorageError, match="the network is gone"):
        storage.put_file(uri, path)
    assert storage.get(uri) == b"before"
    assert not s3._client().list_multipart_uploads(Bucket="work").get("Uploads")


@pytest.mark.parametrize(
    "uri", ["gs://b/x", "http://b/x", "HTTP://b/x", "S3://b/x", "", "s3://", "s3:///key", "file://"]
)
def test_resolve_refuses(uri: str):
    with pytest.raises(ValueError, match=r"s3://BUCKET/PREFIX"):
        storage.resolve(uri)


def test_resolve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("data/x y") == f"{tmp_path}/data/x y"
    assert storage.resolve("file:///data/x") == "/data/x"
    assert storage.resolve("s3://b/a//b") == "s3://b/a//b"
    assert storage.resolve("~/x") == str(Path.home() / "x")


# --- local paths


def test_local_listing_is_in_the_order_of_keys(tmp_path: Path):
    for name in ("a.jpg", "a/z.jpg", "a-b.jpg", "B.jpg", "é.jpg"):
        storage.put(f"{tmp_path}/{name}", b"")
    names = [found.uri.removeprefix(f"{tmp_path}/") for found in storage.list_objects(str(tmp_path))]
    assert names == ["B.jpg", "a-b.jpg", "a.jpg", "a/z.jpg", "é.jpg"] == sorted(names, key=str.encode)


def test_local_link_to_a_folder_above_is_refused(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"in/loop is a symbolic link to a folder above it: remove the link"):
        list(storage.list_objects(str(tmp_path)))


def test_local_links_that_lead_nowhere_are_listed_and_missing(tmp_path: Path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").write_bytes(b"c")
    (tmp_path / "d.jpg").symlink_to(tmp_path / "c.jpg")
    listed = [found.uri for found in storage.list_objects(str(tmp_path))]
    assert listed == [f"{tmp_path}/{name}.jpg" for name in "abcd"]
    for uri in listed[:2]:
        with pytest.raises(storage.ObjectMissingError):
            storage.get(uri)
    assert storage.get(listed[3]) == b"c"


def test_local_pipes_are_not_listed(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "a.jpg").write_bytes(b"a")
    assert [found.uri for found in storage.list_objects(str(tmp_path))] == [f"{tmp_path}/a.jpg"]


def test_local_name_that_is_not_utf8_is_refused(tmp_path: Path):
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(ValueError, match=r"is not valid UTF-8: rename the file"):
        list(storage.list_objects(str(tmp_path)))


def test_local_files_and_folders_in_each_others_place(tmp_path: Path):
    storage.put(f"{tmp_path}/file", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(storage.ObjectMissingError, match=r"it is a folder"):
        storage.get(f"{tmp_path}/folder")
    with pytest.raises(storage.StorageError, match=r"cannot list .*file: .* is a file"):
        list(storage.list_objects(f"{tmp_path}/file"))
    with pytest.raises(storage.ObjectMissingError, match=r"cannot list .*nothing: it does not exist"):
        list(storage.list_objects(f"{tmp_path}/nothing"))
    for write in (storage.put, storage.put_if_absent):
        with pytest.raises(storage.StorageError, match=r"cannot write .*file/below: .* is a file"):
            write(f"{tmp_path}/file/below", b"x")
        with pytest.raises(storage.StorageError, match=r"cannot write .*folder: it is a folder"):
            write(f"{tmp_path}/folder", b"x")
    assert storage.get_if_exists(f"{tmp_path}/file/below") is None
    assert storage.stat(f"{tmp_path}/file/below") is None
    assert storage.stat(f"{tmp_path}/folder") is None
    with pytest.raises(storage.ObjectMissingError):
        storage.get(f"{tmp_path}/{'x' * 400}")


def test_local_permission_denied_names_path_and_remedy(tmp_path: Path):
    path = tmp_path / "secret.jpg"
    path.write_bytes(b"x")
    path.chmod(0)
    with (
        as_nobody(),
        pytest.raises(storage.AccessDeniedError, match=r"cannot read .*secret.jpg: permission denied: check the owner"),
    ):
        storage.get(str(path))


def test_local_writes_leave_nothing_aside_and_listings_hide_what_a_killed_one_left(tmp_path: Path):
    uri = f"{tmp_path}/x"
    storage.put(uri, b"1")
    storage.put_if_absent(uri, b"2")
    info = storage.stat(uri)
    assert info is not None
    storage.put_if_match(uri, b"3", info.etag)
    storage.put_if_match(uri, b"4", info.etag)
    (tmp_path / "y").mkdir()
    with pytest.raises(storage.StorageError):
        storage.put(f"{tmp_path}/y", b"5")
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]
    assert os.stat(uri).st_mode & 0o777 == 0o644
    (tmp_path / ".dragonclf-aside-abc").write_bytes(b"half")
    assert [found.uri for found in storage.list_objects(str(tmp_path))] == [uri]


def test_local_writes_within_one_tick_of_the_clock_have_their_own_etags(tmp_path: Path):
    uri = f"{tmp_path}/x"
    storage.put(uri, b"0000")
    etags = []
    for number in range(100):
        info = storage.stat(uri)
        assert info is not None
        etags.append(info.etag)
        assert storage.put_if_match(uri, b"%04d" % (number + 1), info.etag)
        assert not storage.put_if_match(uri, b"lost", info.etag)
    assert len(set(etags)) == 100


# --- S3


def test_s3_folder_marker(s3_env: LocalS3):
    s3._client().put_object(Bucket="work", Key="marker/dir/", Body=b"")
    assert storage.get("s3://work/marker/dir/") == b""
    assert fetch("s3://work/marker/dir/")[0] == b""


def test_s3_keys_that_obstore_would_normalise_go_through_boto3():
    kept = ["a b", "a#?%2F+", "日本/x", ".hidden", "a..b", "...", "a/b"]
    not_kept = ["a//b", "/a", "./a", "a/./b", "a/../b", "dir/", "", "new\nline", "a\u00a0b"]
    assert [s3._obstore_keeps(key) for key in kept + not_kept] == [True] * len(kept) + [False] * len(not_kept)


def test_s3_keys_that_are_no_normal_paths_keep_apart(monkeypatch: pytest.MonkeyPatch):
    """By moto, for SeaweedFS itself takes some of these for others."""
    keys = ["a//b.jpg", "a/b.jpg", "a/./b.jpg", "a/../b.jpg", "/lead.jpg", "lead.jpg", "./x", "dir/", "back\\slash"]
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s",
        }
        use_identity(environment, monkeypatch)
        s3._client().create_bucket(Bucket="photos")
        for key in keys:
            storage.put(f"s3://photos/{key}", key.encode())
        for key in keys:
            assert fetch(f"s3://photos/{key}")[0] == storage.get(f"s3://photos/{key}") == key.encode()
        listed = [found.uri for found in storage.list_objects("s3://photos")]
        assert listed == sorted(f"s3://photos/{key}" for key in keys)
    finally:
        server.stop()
        s3.forget_clients()


@pytest.mark.parametrize("fails", [False, True])
def test_images_that_wait_for_a_bucket_to_be_opened_share_the_one_try(
    fails: bool, s3_env: LocalS3, monkeypatch: pytest.MonkeyPatch
):
    storage.put("s3://work/once/x", b"x")
    opened, tries = s3._open_obstore, []

    def slow(bucket: str) -> S3Store:
        tries.append(bucket)
        time.sleep(0.3)
        if fails and len(tries) == 1:
            raise storage.StorageError("not now")
        return opened(bucket)

    async def many() -> list[object]:
        return await asyncio.gather(*(storage.fetch("s3://work/once/x") for _ in range(5)), return_exceptions=True)

    s3.forget_clients()
    monkeypatch.setattr(s3, "_open_obstore", slow)
    found = asyncio.run(many())
    assert len(tries) == 1
    assert [str(one) if fails else one[0] for one in found] == ["not now" if fails else b"x"] * 5  # pyright: ignore[reportIndexIssue]
    assert fetch("s3://work/once/x")[0] == b"x"  # a failure is not kept


def test_s3_missing_bucket(s3_env: LocalS3):
    pattern = "there is no bucket 'no-such': check its name, AWS_REGION and AWS_ENDPOINT_URL"
    calls: list[Callable[[], object]] = [
        lambda: list(storage.list_objects("s3://no-such/x")),
        lambda: storage.get("s3://no-such/x"),
        lambda: fetch("s3://no-such/x"),
    ]
    for call in calls:
        with pytest.raises(storage.StorageError, match=pattern) as caught:
            call()
        assert type(caught.value) is storage.StorageError, "a missing bucket is not a missing image"


def test_s3_names_that_no_object_can_have(s3_env: LocalS3):
    assert storage.stat("s3://work/") is None
    for read in (storage.get, fetch):
        with pytest.raises(storage.ObjectMissingError, match=r"cannot read s3://work/: it does not exist"):
            read("s3://work/")
        with pytest.raises(storage.StorageError, match=r'no such name is possible: .*Invalid bucket name "No Bucket"'):
            read("s3://No Bucket/x")


@pytest.mark.parametrize("identity", ["wrong secret", "unknown key"])
def test_s3_refused_credentials_are_not_blamed_on_rights(
    identity: str, s3_env: LocalS3, monkeypatch: pytest.MonkeyPatch
):
    storage.put("s3://work/creds/x", b"x")
    secret = "wrongwrongwrongwrongwrong"
    change = {"AWS_SECRET_ACCESS_KEY": secret} if identity == "wrong secret" else {"AWS_ACCESS_KEY_ID": "AKIANOBODY"}
    use_identity(s3_env.environment("admin") | change, monkeypatch)
    secrets = (secret, s3_env.environment("admin")["AWS_SECRET_ACCESS_KEY"])
    uri = "s3://work/creds/x"
    calls: dict[str, Callable[[], object]] = {
        "list": lambda: list(storage.list_objects("s3://work/creds")),
        "read": lambda: storage.get(uri),
        "read by fetch": lambda: fetch(uri),
        "read by stat": lambda: storage.stat(uri),
        "write": lambda: storage.put(uri, b"y"),
        "write if absent": lambda: storage.put_if_absent(uri, b"y"),
    }
    for name, call in calls.items():
        with pytest.raises(
            storage.StorageError, match=f"cannot {name.split()[0]} s3://work/creds.*AWS_SECRET_ACCESS_KEY"
        ) as caught:
            call()
        assert type(caught.value) is storage.CredentialsError, name
        assert not any(word in str(caught.value) for word in secrets)


def test_s3_read_only_identity(s3_env: LocalS3, monkeypatch: pytest.MonkeyPatch):
    storage.put("s3://work/ro/x", b"x")
    use_identity(s3_env.environment("reader"), monkeypatch)
    assert storage.get("s3://work/ro/x") == fetch("s3://work/ro/x")[0] == b"x"
    assert [found.size for found in storage.list_objects("s3://work/ro")] == [1]
    for write in (storage.put, storage.put_if_absent):
        with pytest.raises(
            storage.AccessDeniedError, match=r"cannot write s3://work/ro/y: .*give this identity the right to write"
        ):
            write("s3://work/ro/y", b"y")
    use_identity(s3_env.environment("admin"), monkeypatch)
    assert storage.stat("s3://work/ro/y") is None


def test_s3_lists_more_than_a_page(s3_env: LocalS3):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: storage.put(f"s3://work/many/{i:04d}", b""), range(1003)))
    assert [found.uri for found in storage.list_objects("s3://work/many")] == [
        f"s3://work/many/{i:04d}" for i in range(1003)
    ]


def test_s3_a_body_cut_short_is_read_again(monkeypatch: pytest.MonkeyPatch):
    with flaky_server(failures=2) as (endpoint, requests):
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s",
        }
        use_identity(environment, monkeypatch)
        assert storage.get("s3://photos/x") == b"0123456789"
        assert len(requests) == 3
    s3.forget_clients()


@contextlib.contextmanager
def flaky_server(*, failures: int) -> Iterator[tuple[str, list[str]]]:
    """Answers every GET with ten bytes, of which the first `failures` answers send five."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "10")
            self.send_header("ETag", '"e"')
            self.end_headers()
            self.wfile.write(b"01234" if len(requests) <= failures else b"0123456789")
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", requests
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything, so it becomes someone else for a while."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def together(count: int, call: Callable[[int], object]) -> list[object]:
    """Call from `count` threads that start at one time; results in order."""
    barrier = threading.Barrier(count)

    def start(i: int) -> object:
        barrier.wait()
        return call(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))
