"""Read what a run published, and nothing else: `read_scores`."""

import pyarrow.dataset as ds

from dragonclf import storage
from dragonclf.engine import published


def read_scores(uri: str, *, run: str | None = None) -> ds.Dataset:
    """Return the rows of a published run as a pyarrow dataset, read lazily: one row per image, columns as in the README.

    Args:
        uri: What was given as ``--out``, or the URI of one run.
        run: Name of a run under `uri`. None: the newest published one, or `uri` itself if it is a run's.

    Each part was checked to be there and to be as it was when the run was published. A run that is not published is refused, whatever
    of it is there already. On S3 the credentials of now are used; temporary ones must outlive the reading.

    Raises:
        ValueError: nothing is published there, or a part is missing or was changed since.
        StorageError: the store does not answer.
    """
    run_uri = published.find_run(uri) if run is None else storage.join(storage.resolve(uri), "runs", run)
    return published.open_rows(run_uri, published.read_manifest(run_uri))
