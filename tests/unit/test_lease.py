"""The lease: one holder, taken over from the dead at once and from the silent in time, never shared."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dragonclf import storage
from dragonclf.engine import lease
from dragonclf.outcomes import BusyError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(lease, "TTL_S", 1.0)
    monkeypatch.setattr(lease, "POLL_S", 0.05)


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "lease.json")
    request.getfixturevalue("s3_env")
    return f"s3://work/{tmp_path.parent.name}/{tmp_path.name}/lease.json"


@contextlib.contextmanager
def acquired(uri: str, *, at_least_once: bool = False) -> Iterator[lease.Lease]:
    with lease.Lease(uri, at_least_once=at_least_once) as made:
        made.acquire()
        yield made


def held(uri: str) -> lease.Holder:
    return lease.Holder.model_validate_json(storage.get(uri))


def test_held_renewed_released_and_taken_again(uri: str):
    with acquired(uri) as first:
        assert first.fence == 1
        first.ensure()
        beat = held(uri).beat
        deadline = time.monotonic() + 10
        while held(uri).beat < beat + 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert held(uri).released
    with acquired(uri) as second:
        assert second.fence == 2


def test_a_second_driver_is_told_who_is_at_work(uri: str):
    with acquired(uri), pytest.raises(BusyError, match=rf"process {os.getpid()} on .* holds {uri}"), acquired(uri):  # fmt: skip
        pytest.fail("two hold one lease")


def test_of_many_at_once_one_holds(uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "TTL_S", 30.0)  # six threads on two cores may keep a heartbeat waiting
    inside, most, busy = 0, 0, 0
    lock, start = threading.Lock(), threading.Barrier(6)

    def contend() -> None:
        nonlocal inside, most, busy
        start.wait()
        try:
            with acquired(uri):
                with lock:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.8)
                with lock:
                    inside -= 1
        except BusyError:
            busy += 1

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert busy >= 1


HOLD = """
import sys, time
from dragonclf.engine import lease
from dragonclf.outcomes import BusyError
lease.HEARTBEAT_S, lease.TTL_S, lease.POLL_S = 0.1, 1.0, 0.05
try:
    with lease.Lease(sys.argv[1]) as held:
        held.acquire()
        print("held", flush=True)
        time.sleep(60)
except BusyError as error:
    print(error, flush=True)
"""


def start_holder(uri: str) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, uri], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_dead_driver_of_this_host_is_taken_over_at_once(uri: str, monkeypatch: pytest.MonkeyPatch):
    holder = start_holder(uri)
    holder.kill()
    holder.communicate()
    monkeypatch.setattr(lease, "TTL_S", 1000.0)
    with acquired(uri) as taken:
        assert taken.fence == 2


def test_a_frozen_driver_is_taken_over_in_time_and_stops_when_it_wakes(uri: str):
    holder = start_holder(uri)
    holder.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with acquired(uri) as taken:
        assert time.monotonic() - started >= lease.TTL_S
        assert taken.fence == 2
        holder.send_signal(signal.SIGCONT)
        out, _ = holder.communicate(timeout=20)
        assert "another driver took over" in out
        taken.ensure()
        assert held(uri).fence == 2


def test_who_lost_the_lease_cannot_ensure_it(uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 1000.0)
    with acquired(uri) as ours:
        storage.put(uri, held(uri).model_copy(update={"fence": 7, "token": "other"}).model_dump_json().encode())
        with pytest.raises(BusyError, match="another driver took over"):
            ours.ensure()
    assert held(uri).fence == 7
    assert not held(uri).released


def test_a_lease_that_could_not_be_released_is_free_for_its_own_process(uri: str, monkeypatch: pytest.MonkeyPatch):
    def fail(uri: str, data: bytes, *, etag: str) -> None:
        raise storage.StorageError(f"cannot write {uri}")

    with monkeypatch.context() as patch, acquired(uri):
        patch.setattr(storage._store(uri), "replace", fail)
    assert not held(uri).released
    monkeypatch.setattr(lease, "TTL_S", 1000.0)
    with acquired(uri) as again:
        assert again.fence == 2


def test_a_store_without_conditions_is_refused_or_accepted(uri: str, monkeypatch: pytest.MonkeyPatch):
    store = storage._store(uri)
    monkeypatch.setattr(store, "create", lambda uri, data: store.put(uri, data))
    monkeypatch.setattr(store, "replace", lambda uri, data, *, etag: store.put(uri, data))
    with pytest.raises(ValueError, match=r"keeps no conditional writes .* --at-least-once"), acquired(uri):
        pytest.fail("accepted")
    storage.put(uri, held(uri).model_copy(update={"released": True}).model_dump_json().encode())
    with acquired(uri, at_least_once=True) as ours:
        assert not ours.atomic
        ours.ensure()
    assert held(uri).released


def test_a_store_that_says_it_has_no_conditions(uri: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(uri: str, data: bytes, **etag: str) -> None:
        raise storage.UnconditionalStoreError(
            f"cannot write {uri}: A header you provided implies functionality that is not implemented"
        )

    for name in ("create", "replace"):
        monkeypatch.setattr(storage._store(uri), name, refuse)
    with pytest.raises(ValueError, match="keeps no conditional writes"), acquired(uri):
        pytest.fail("accepted")
    assert storage.stat(uri) is None
    with acquired(uri, at_least_once=True) as ours:
        ours.ensure()
    assert held(uri).released
