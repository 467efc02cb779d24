"""Keep rows of an earlier published run, and process only the images whose rows there do not hold any more.

Each run is whole in itself: rows are copied into its own parts, and nothing refers to the other run's files. Which rows hold depends on
the two plans. With the same plan (errors are retried) it is every row whose status would come out the same; with a newer listing it is
the row of an object with the same uri and etag.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from dragonclf import storage
from dragonclf.data import sorting, tables
from dragonclf.engine import plan, published

# What may come out otherwise next time; the other statuses are the image's own.
RETRIED = ("missing", "denied", "timeout", "decoder_crash")
DELETED = "deleted.parquet"


class EarlierRows:
    """The rows of the published run `base_uri`, for shards of another run. One for a process: it reads what all shards need once.

    `same_plan` says that the other run has this one's plan. ValueError if the run is not whole.
    """

    def __init__(self, base_uri: str, *, same_plan: bool):
        self._same_plan = same_plan
        manifest = published.read_manifest(base_uri)
        self._parts = published.check_parts(base_uri, manifest)
        ranges = published.read_parts_table(base_uri, manifest)
        self._ranges = list(zip(ranges["first_uri"].to_pylist(), ranges["last_uri"].to_pylist(), strict=True))
        summary = plan.read_summary(base_uri)
        assert summary is not None
        # A part ends with the input's further columns: those of a new listing are as it says, not as they were.
        self._num_further = plan.read_shard(base_uri, summary, 0).num_columns - len(plan.COLUMNS) if self._parts else 0

    def complete(self, shard: int, planned: pa.Table, process: Callable[[pa.Table], pa.Table]) -> tuple[pa.Table, int]:
        """Return the shard's rows, in the plan's order, and how many of them were kept. `process` makes the others, if there are any."""
        found, places = self._kept(shard, planned)
        num_kept = len(places)
        again = sorted(set(range(planned.num_rows)).difference(places))
        if again:
            found.append(process(planned.take(again)))
        order = np.argsort(places + again)
        rows = pa.concat_tables([table.replace_schema_metadata(None) for table in found])
        return rows.take(order), num_kept

    def _kept(self, shard: int, planned: pa.Table) -> tuple[list[pa.Table], list[int]]:
        """Rows that hold, and the place of each in the plan."""
        place_of = {uri: place for place, uri in enumerate(planned["uri"].to_pylist())}
        etags = [etag and etag.strip('"') for etag in planned["etag"].to_pylist()]
        found: list[pa.Table] = []
        places: list[int] = []
        for part in [shard] if self._same_plan else self._overlapping(planned):
            rows = tables.read(self._parts[part])
            holding: dict[int, int] = {}  # row -> place
            cells = zip(*(rows[name].to_pylist() for name in ("uri", "etag", "status")), strict=True)
            for row, (uri, etag, status) in enumerate(cells):
                place = place_of.get(uri)
                if place is None or status in RETRIED:
                    continue
                if self._same_plan or (etag is not None and etag == etags[place]):
                    holding[row] = place
            if holding:
                kept = rows.take(list(holding))
                found.append(kept if self._same_plan else self._as_listed(kept, planned.take(list(holding.values()))))
                places += holding.values()
        return found, places

    def _overlapping(self, planned: pa.Table) -> list[int]:
        """Parts whose range of uris meets the shard's. Right in any order of the plans; few parts where both are sorted."""
        uris = planned["uri"].to_pylist()
        least, most = min(uris), max(uris)
        return [part for part, (first, last) in enumerate(self._ranges) if first <= most and last >= least]

    def _as_listed(self, rows: pa.Table, planned: pa.Table) -> pa.Table:
        """An object that had changed since that run's listing is, as it was read, what this run's listing tells."""
        own = rows.select(rows.column_names[: rows.num_columns - self._num_further])
        is_changed = [status == "changed" for status in own["status"].to_pylist()]
        for name, now in (("status", "ok"), ("error", None)):
            values = [
                now if changed else value for changed, value in zip(is_changed, own[name].to_pylist(), strict=True)
            ]
            own = own.set_column(own.column_names.index(name), name, pa.array(values, pa.string()))
        return with_input(own, planned)


def with_input(own: pa.Table, planned: pa.Table) -> pa.Table:
    """Append the input's further columns to a job's own; one whose name is taken becomes ``input_<name>``."""
    for name in planned.column_names[len(plan.COLUMNS) :]:
        free = name
        while free in own.column_names:
            free = f"input_{free}"
        own = own.append_column(free, planned[name])
    return own


def write_deleted(run_uri: str, summary: plan.PlanSummary, base_uri: str) -> int:
    """List the images of `base_uri` that the run no longer has in ``RUN/deleted.parquet``, sorted. Returns how many. Out of core."""
    base = plan.read_summary(base_uri)
    assert base is not None
    with sorting.database() as (db, folder):
        for name, uri, its_plan in (("earlier", base_uri, base), ("present", run_uri, summary)):
            db.execute(f"CREATE TABLE {name} (uri VARCHAR)")
            for shard in range(its_plan.num_shards):
                db.register("batch", plan.read_shard(uri, its_plan, shard).select(["uri"]))
                db.execute(f"INSERT INTO {name} SELECT uri FROM batch")  # noqa: S608  names of our own
                db.unregister("batch")
        path = folder / DELETED
        db.execute(
            f"COPY (SELECT uri FROM earlier ANTI JOIN present USING (uri) ORDER BY uri) TO '{path}' (FORMAT parquet, COMPRESSION zstd)"  # noqa: S608
        )
        [(count,)] = db.execute(f"SELECT count(*) FROM '{path}'").fetchall()  # noqa: S608
        storage.put_file(storage.join(run_uri, DELETED), path)
    return count
