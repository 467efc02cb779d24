"""A model check of the publication protocol: the real code of lease, runs and publication on a store in memory, step by step.

Drivers are threads that stop before each operation on the store. Hypothesis chooses who moves, how far, and who is killed (before or after
an operation took effect), while the input changes, answers to writes are lost and strangers copy files. Nobody gives heartbeats and every
clock runs fast, so any driver may be taken over at any time and go on as a zombie. After each step the invariants of
docs/guarantees.md are checked by what a reader sees. Three planted bugs must be found.
"""

import concurrent.futures
import functools
import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from dragonclf import storage
from dragonclf.data import tables
from dragonclf.engine import lease, plan, published, reuse, runs
from dragonclf.outcomes import BusyError
from dragonclf.storage.errors import ObjectInfo, PreconditionError, missing

OUT, VERB, SPEC = "mem/out", "score", {"model": "m"}
SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
DRIVERS = range(2)


def remembered(decode: Callable[..., pa.Table]) -> Callable[..., pa.Table]:
    """`tables.decode` that decodes equal files once: the same few are looked at after each step, which was half of the time."""
    kept = functools.lru_cache(1_000)(
        lambda data, name, columns: decode(data, name, columns=list(columns) if columns else None)
    )
    return lambda data, name, columns=None: kept(data, name, None if columns is None else tuple(columns))


DECODE = remembered(tables.decode)


class KilledError(BaseException):
    """kill -9, as the thread sees it."""


class Driver:
    """A command under way: a thread that waits before each operation for its turn."""

    def __init__(self, body: Callable[[], None]):
        self.killed = False
        self.error: BaseException | None = None
        self._turn, self._waiting = threading.Semaphore(0), threading.Semaphore(0)
        self.ended = False
        self.about_to = ""  # write this, or nothing
        self._thread = threading.Thread(target=self._run, args=(body,), daemon=True)
        self._thread.driver = self  # type: ignore[attr-defined]
        self._thread.start()
        self._waiting.acquire()

    def _run(self, body: Callable[[], None]) -> None:
        try:
            body()
        except (KilledError, BusyError):
            pass
        except BaseException as error:  # noqa: BLE001
            self.error = error
        self.ended = True
        self._waiting.release()

    def step(self) -> None:
        """Let it do one operation, or end."""
        if not self.ended:
            self._turn.release()
            self._waiting.acquire()

    def wait_for_turn(self, about_to: str) -> None:
        self.about_to = about_to
        if not self.killed:
            self._waiting.release()
            self._turn.acquire()
        if self.killed:
            raise KilledError


class Store:
    """Strongly consistent objects in memory, with conditional writes. Each operation is atomic and one step of its driver."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self._etags = itertools.count(1)
        self.lose_next_answer = False
        self.kill_after_next_write = False

    def _enter(self, about_to: str = "") -> Driver | None:
        driver = getattr(threading.current_thread(), "driver", None)
        if driver is not None:
            driver.wait_for_turn(about_to)
        return driver

    def _write(self, driver: Driver | None, uri: str, data: bytes) -> None:
        self.objects[uri] = (data, str(next(self._etags)))
        if driver is not None and self.kill_after_next_write:
            self.kill_after_next_write = False
            driver.killed = True
            raise KilledError

    def list_objects(self, uri: str) -> Iterator[ObjectInfo]:
        self._enter()
        found = sorted(key for key in self.objects if key.startswith(uri + "/"))
        return iter([ObjectInfo(key, self.objects[key][1], len(self.objects[key][0])) for key in found])

    def stat(self, uri: str) -> ObjectInfo | None:
        self._enter()
        found = self.objects.get(uri)
        return ObjectInfo(uri, found[1], len(found[0])) if found else None

    def get(self, uri: str, *, last_bytes: int | None = None) -> tuple[bytes, str]:
        self._enter()
        if uri not in self.objects:
            raise missing("read", uri)
        data, etag = self.objects[uri]
        return (data if last_bytes is None else data[-last_bytes:]), etag

    def put(self, uri: str, data: bytes) -> None:
        self._write(self._enter(uri), uri, data)

    def create(self, uri: str, data: bytes) -> None:
        driver = self._enter(uri)
        if uri in self.objects:
            raise PreconditionError
        self._write(driver, uri, data)
        if self.lose_next_answer:  # the client tries again, and finds its own object
            self.lose_next_answer = False
            raise PreconditionError

    def replace(self, uri: str, data: bytes, *, etag: str) -> None:
        driver = self._enter(uri)
        if uri not in self.objects:
            raise missing("write", uri)
        if self.objects[uri][1] != etag:
            raise PreconditionError
        self._write(driver, uri, data)
        if self.lose_next_answer:
            self.lose_next_answer = False
            raise PreconditionError


class FastClock:
    """Each look at it is half a time to live later: whoever watches a lease sees it run out."""

    def __init__(self) -> None:
        self._ticks = itertools.count()

    def monotonic(self) -> float:
        return next(self._ticks) * lease.TTL_S / 2

    def time(self) -> float:
        return self.monotonic()

    def sleep(self, seconds: float) -> None:
        pass


class Serial:
    """Does at once what a thread pool would do, in the driver's own thread."""

    def __init__(self, *_: object): ...

    def __enter__(self) -> "Serial":
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, function: Callable[[Any], Any], items: Any) -> list[Any]:
        return [function(item) for item in items]

    def submit(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> "concurrent.futures.Future[Any]":
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        done.set_result(function(*arguments, **options))
        return done


def score_shard(run: runs.Run, planned: pa.Table, status: str) -> pa.Table:
    """Rows as an actor makes them. What it makes of an image depends on when it looks: `status`."""
    table = planned.append_column("status", pa.array([status] * planned.num_rows))
    return table.append_column("error", pa.nulls(planned.num_rows, pa.string()))


def write_deleted(run_uri: str, summary: plan.PlanSummary, base_uri: str) -> int:
    """What `reuse.write_deleted` does, without a database: opening one takes longer than all else here."""
    base = plan.read_summary(base_uri)
    assert base is not None
    then, now = (
        {uri for shard in range(its.num_shards) for uri in plan.read_shard(run, its, shard)["uri"].to_pylist()}
        for run, its in ((base_uri, base), (run_uri, summary))
    )
    gone = sorted(then - now)
    storage.put(f"{run_uri}/{reuse.DELETED}", tables.encode(pa.table({"uri": pa.array(gone, pa.string())})))
    return len(gone)


def facts_of(table: pa.Table) -> published.PartFacts:
    uris = table["uri"].to_pylist()
    counts = Counter(table["status"].to_pylist())
    return published.PartFacts(counts=counts, first_uri=min(uris), last_uri=max(uris), num_kept=0)


class Protocol(RuleBasedStateMachine):
    """Drivers, a store, and what readers have seen."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(storage, "_store", lambda uri: self.store)
        self.patch.setattr(lease, "time", FastClock())
        self.patch.setattr(plan, "time", FastClock())
        self.patch.setattr(lease, "HEARTBEAT_S", 1e6)
        self.patch.setattr("concurrent.futures.ThreadPoolExecutor", Serial)
        self.patch.setattr(tables, "decode", DECODE)
        self.plant()
        self.drivers: dict[int, Driver] = {}
        self.version = 0
        self.seen: dict[str, list[tuple[str, str]]] = {}
        self.latest = 0.0

    def plant(self) -> None:
        """Put a bug in. None here."""

    def stage(self) -> plan.StagedPlan:
        """Three images: the first is in every listing, the others in this one only."""
        rows = [{"uri": f"in/{etag}/{i}", "etag": etag, "size": 1} for i, etag in enumerate(self.etags())]
        return plan.stage_plan([pa.Table.from_pylist(rows, schema=SCHEMA)], shard_images=2)

    def etags(self) -> list[str]:
        return ["same", f"v{self.version}", f"v{self.version}"]

    def finish(self, run: runs.Run, held: lease.Lease) -> None:
        """The end of a job, as `job.run` has it."""
        held.ensure()
        deleted = write_deleted(run.uri, run.plan, run.base) if run.base and not run.same_plan else 0
        published.point_to(OUT, runs.publish(run, fence=held.fence, num_deleted=deleted))

    def drive(self, status: str, **options: Any) -> None:
        with lease.Lease(runs.lease_uri(OUT, VERB, SPEC)) as held:
            run = runs.open_run(OUT, VERB, SPEC, self.stage, held=held, **options)
            if run.published:
                published.point_to(OUT, published.read_manifest(run.uri))
                return
            for shard in runs.missing_shards(run):
                planned = plan.read_shard(run.uri, run.plan, shard)
                runs.begin_shard(run, shard)
                if run.base is None:
                    runs.write_part(run, shard, score_shard(run, planned, status))
                else:
                    earlier = reuse.EarlierRows(run.base, same_plan=run.same_plan)
                    table, kept = earlier.complete(shard, planned, lambda rows: score_shard(run, rows, status))
                    runs.write_part(run, shard, table, num_kept=kept)
            self.finish(run, held)

    @rule(
        who=st.sampled_from(DRIVERS),
        status=st.sampled_from(["ok", "timeout", "unreadable"]),
        how=st.sampled_from(["", "", "", "new_run", "retry_errors", "since"]),
    )
    def start(self, who: int, status: str, how: str) -> None:
        if who not in self.drivers or self.drivers[who].ended:
            options = {how: "latest" if how == "since" else True} if how else {}
            if how == "retry_errors" and not self.seen:
                return
            self.drivers[who] = Driver(lambda: self.drive(status, **options))

    @precondition(lambda self: any(not driver.ended for driver in self.drivers.values()))
    @rule(who=st.sampled_from(DRIVERS), count=st.integers(1, 60))
    def step(self, who: int, count: int) -> None:
        for _ in range(count if who in self.drivers else 0):
            self.drivers[who].step()

    @precondition(lambda self: any(not driver.ended for driver in self.drivers.values()))
    @rule(who=st.sampled_from(DRIVERS))
    def step_to_its_next_mark(self, who: int) -> None:
        """To just before it writes a part, a manifest or the pointer: most of what matters happens there."""
        driver = self.drivers.get(who)
        if driver is not None:
            driver.step()
            while not driver.ended and not _is_mark(driver.about_to):
                driver.step()

    @precondition(lambda self: any(not driver.ended for driver in self.drivers.values()))
    @rule(who=st.sampled_from(DRIVERS))
    def run_to_its_end(self, who: int) -> None:
        while who in self.drivers and not self.drivers[who].ended:
            self.drivers[who].step()

    @precondition(lambda self: any(not driver.ended for driver in self.drivers.values()))
    @rule(who=st.sampled_from(DRIVERS))
    def kill(self, who: int) -> None:
        if who in self.drivers and not self.drivers[who].ended:
            self.drivers[who].killed = True
            self.drivers[who].step()

    @rule(lost=st.booleans())
    def disturb_the_next_write(self, lost: bool) -> None:
        if lost:
            self.store.lose_next_answer = True
        else:
            self.store.kill_after_next_write = True

    @rule()
    def change_the_input(self) -> None:
        self.version += 1

    @precondition(lambda self: self.place_without_part() is not None)
    @rule()
    def a_stranger_copies_a_part_to_the_place_of_another(self) -> None:
        place = self.place_without_part()
        assert place is not None
        self.store.put(place, next(data for key, (data, _) in sorted(self.store.objects.items()) if "/parts/" in key))

    def place_without_part(self) -> str | None:
        """Where the newest run's first missing part will be, if there are any parts at all."""
        claims = sorted(key for key in self.store.objects if key.endswith(runs.CLAIM))
        places = (
            [claims[-1].removesuffix(runs.CLAIM) + f"parts/{shard:08d}.parquet" for shard in range(2)] if claims else []
        )
        missing_ones = [place for place in places if place not in self.store.objects]
        return missing_ones[0] if missing_ones and any("/parts/" in key for key in self.store.objects) else None

    @invariant()
    def readers_see_whole_runs_that_never_change(self) -> None:
        for driver in self.drivers.values():
            # A stranger's part stops a driver with a clear error; anything else is a bug.
            assert driver.error is None or "is not this run's part" in str(driver.error), repr(driver.error)
        for key in [key for key in self.store.objects if key.endswith(published.MANIFEST)]:
            run_uri = key.removesuffix(f"/{published.MANIFEST}")
            manifest = published.read_manifest(run_uri)
            assert len(published.check_parts(run_uri, manifest)) == manifest.num_parts == 2
            table = pa.concat_tables(published.read_parts(run_uri))
            rows = list(zip(table["etag"].to_pylist(), table["status"].to_pylist(), strict=True))
            assert rows[0][0] == "same"
            assert len({etag for etag, _ in rows[1:]}) == 1, "rows of two listings"
            planned = pa.concat_tables(
                plan.read_shard(run_uri, summary, shard)
                for summary in [plan.read_summary(run_uri)]
                if summary
                for shard in range(2)
            )
            expected = [f"in/{etag}/{i}" for i, (etag, _) in enumerate(rows)]
            assert table["uri"].to_pylist() == planned["uri"].to_pylist() == expected
            if manifest.base and manifest.num_deleted:
                gone = tables.read(f"{run_uri}/{reuse.DELETED}")["uri"].to_pylist()
                then = {f"in/{etag}/{i}" for i, (etag, _) in enumerate(self.seen[f"{OUT}/runs/{manifest.base}"])}
                assert gone == sorted(then - set(expected))
            assert Counter(status for _, status in rows) == manifest.counts
            assert self.seen.setdefault(run_uri, rows) == rows
        if f"{OUT}/{published.LATEST}" in self.store.objects:
            pointer = json.loads(self.store.objects[f"{OUT}/{published.LATEST}"][0])
            assert f"{OUT}/runs/{pointer['run']}" in self.seen, "the latest run is not published"
            assert pointer["planned_s"] >= self.latest
            self.latest = pointer["planned_s"]

    def teardown(self) -> None:
        """Whatever happened: one more command, undisturbed, ends with the newest run published and pointed to."""
        try:
            self.store.lose_next_answer = self.store.kill_after_next_write = False
            for driver in self.drivers.values():
                driver.killed = True
                driver.step()
            for key in [key for key in self.store.objects if "/parts/" in key]:
                metadata = tables.decode(self.store.objects[key][0], key).schema.metadata
                said = f"{metadata[b'dragonclf.run'].decode()}/parts/{int(metadata[b'dragonclf.shard']):08d}.parquet"
                if not key.endswith(said):
                    del self.store.objects[key]  # what a person does about a stranger's part: the error says so
            for _ in range(2):  # the first may resume a run of an older listing
                self.drivers = {0: Driver(lambda: self.drive("ok"))}
                self.run_to_its_end(0)
                self.readers_see_whole_runs_that_never_change()
            rows = self.seen[published.read_latest(OUT)]
            assert [etag for etag, _ in rows] == self.etags()
        finally:
            self.patch.undo()


def _is_mark(uri: str) -> bool:
    return "/parts/" in uri or uri.endswith((published.MANIFEST, published.LATEST))


class NoFooterCheck(Protocol):
    """Whatever bears a part's name is taken for it."""

    def plant(self) -> None:
        def believe(uri: str, run: str, shard: int, num_rows: int) -> published.PartFacts:
            return facts_of(tables.read(uri))

        self.patch.setattr(published, "check_part", believe)


class LatestFirst(Protocol):
    """The pointer is moved, then the run published."""

    def finish(self, run: runs.Run, held: lease.Lease) -> None:
        pointer = {"run": run.name, "planned_s": run.plan.planned_s}
        published.advance_pointer(f"{OUT}/{published.LATEST}", pointer)
        super().finish(run, held)


class LeaseWithoutFencing(Protocol):
    """Whoever once got the lease writes as if it had it still: no condition keeps a zombie's part from replacing another's."""

    def plant(self) -> None:
        def write(run: runs.Run, shard: int, table: pa.Table, *, num_kept: int = 0) -> published.PartFacts:
            facts = facts_of(table)
            said = {
                "dragonclf.run": run.name,
                "dragonclf.shard": str(shard),
                "dragonclf.facts": facts.model_dump_json(),
            }
            storage.put(run.part_uri(shard), tables.encode(table, metadata=said))
            return facts

        self.patch.setattr(runs, "write_part", write)


def check(machine: type[Protocol], *, examples: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=20, deadline=None, derandomize=True, database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], phases=[Phase.generate],
        ),
    )  # fmt: skip


def test_the_protocol_keeps_its_invariants():
    check(Protocol, examples=500)


@pytest.mark.parametrize("bug", [NoFooterCheck, LatestFirst, LeaseWithoutFencing])
def test_a_planted_bug_is_found(bug: type[Protocol]):
    with pytest.raises((AssertionError, ValueError)):
        check(bug, examples=1000)
