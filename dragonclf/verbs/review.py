"""`review`: a page of the pictures of a run that a person should look at, which ends in a file of corrections for `index`."""

import logging
from collections import Counter

import duckdb
import pyarrow.dataset as ds
from pydantic import BaseModel, Field

from dragonclf import storage
from dragonclf.config import ReviewConfig
from dragonclf.engine import published, scored
from dragonclf.engine.database import temporary_database
from dragonclf.evaluate.review import KEYS, Candidate, read_thumbnails, render_review

log = logging.getLogger("dragonclf")

PAGE, PREDICTIONS, LABEL = "review.html", "predictions.parquet", "input_label"
# What is asked first. Least probable label first is the highest loss first; "self-confidence" in confident learning (Northcutt, Jiang,
# Chuang, JAIR 2021, https://arxiv.org/abs/1911.00068). Its adjustment by each class's mean was tried and left: of 5 % flipped labels in
# scikit-learn's digits, 3-fold logistic regression, half of the classes thinned to 15 %, the first 15 % of the ranking held 95 % by
# self-confidence, 45 % less the class's mean, 98 % divided by it; 91, 86 and 90 % of odd and even 3.3 : 1 (mean of 4 draws, 2026-11-26).
ORDERS = {
    "loss": "own",
    "uncertain": "likeliest_probs[1] - likeliest_probs[2]",
    "random": "sha256($seed || ':' || uri)",
}
SAID = {
    "loss": "whose label the model thinks least probable, the least first: suspected label errors",
    "uncertain": "where the two likeliest classes are closest, the closest first",
    "random": "drawn at random",
}


class ReviewSummary(BaseModel):
    """What there is to look at."""

    page: str = Field(description="URI of review.html.")
    by: str = Field(description="How the pictures were chosen: loss, uncertain or random.")
    num_pictures: int
    num_candidates: int = Field(description="Images that they were chosen from: predicted, and labelled for loss.")
    left_out: dict[str, int] = Field(
        description="Of the chosen, those that the page cannot show, by reason: missing, replaced since they were scored, or unreadable."
    )


def review(config: ReviewConfig) -> ReviewSummary:
    """Write review.html, one file that works from disk, under `config.out`, over an earlier one. The run is ranked out of core.

    Raises:
        ValueError: the run is not published, has no probabilities, no predicted image, or no label and is to be ranked by loss; or no
            picture can be shown.
        StorageError: the store does not answer, or the temporary folder is full.
    """
    with temporary_database("review") as (db, _):
        name, classes = _load(db, config.run)
        by, candidates, num_candidates = _rank(db, name, classes, config)
        offered = _offered(db, classes)
    thumbnails, reasons = read_thumbnails([(one.uri, one.etag) for one in candidates])
    left_out = dict(sorted(Counter(reason.partition(":")[0] for reason in reasons.values()).items()))
    if reasons:
        first = next(iter(reasons))
        told = (
            f"{len(reasons):,} of {len(candidates):,} pictures cannot be shown; the first is {first}: {reasons[first]}"
        )
        if not thumbnails:
            raise ValueError(f"{told}: is this the bucket that was scored? Score what is there now")
        log.warning("review: %s", told)
    shown = [one for one in candidates if one.uri in thumbnails]
    page = storage.join(config.out, PAGE)
    storage.put(page, render_review(shown, thumbnails=thumbnails, classes=offered, run=name, order=SAID[by]))
    return ReviewSummary(
        page=page, by=by, num_pictures=len(shown), num_candidates=num_candidates, left_out=left_out
    )  # fmt: skip


def _load(db: duckdb.DuckDBPyConnection, uri: str) -> tuple[str, list[str | None]]:
    """Make the table `scored` of what `evaluate` wrote under `uri`, else of a published run. Returns its name and classes by place."""
    predictions = storage.join(uri, PREDICTIONS)
    if storage.stat(predictions):
        filesystem, paths = storage.arrow_files([predictions])
        rows = ds.dataset(paths, format="parquet", filesystem=filesystem)
        prob_columns = _prob_columns(predictions, rows.schema.names)
        return uri, scored.load_rows(db, "scored", rows, predictions, prob_columns=prob_columns, further=[LABEL])
    run_uri = published.find_run(uri)
    manifest = published.read_manifest(run_uri)
    rows = published.open_rows(run_uri, manifest)
    prob_columns = scored.find_prob_columns(run_uri, manifest.verb, rows.schema.names)
    return run_uri, scored.load_rows(db, "scored", rows, run_uri, prob_columns=prob_columns, further=[LABEL])


def _prob_columns(uri: str, names: list[str]) -> list[str]:
    """Those of predictions.parquet: after the answers, or last where a list was taken apart, past 32 classes."""
    if "confidence" not in names:
        raise ValueError(f"{uri} has no column 'confidence': it is not what `evaluate` writes")
    after = [name for name in names[names.index("confidence") + 1 :] if name != "abstain"]
    for ordered in (after, after[::-1]):
        stop = next((place for place, name in enumerate(ordered) if not name.startswith("prob_")), len(ordered))
        if stop:
            return [name for name in after if name in ordered[:stop]]
    raise ValueError(f"{uri} has no probabilities: it is not what `evaluate` writes")


def _rank(
    db: duckdb.DuckDBPyConnection, name: str, classes: list[str | None], config: ReviewConfig
) -> tuple[str, list[Candidate], int]:
    """How the images were ranked, the first of them, and how many there are."""
    db.execute("CREATE TABLE class (name VARCHAR, place INTEGER)")
    db.executemany("INSERT INTO class VALUES (?, ?)", [[name, place] for place, name in enumerate(classes, 1)])
    db.execute(
        f"""CREATE VIEW candidate AS
              SELECT uri, etag, {LABEL} AS label, scored.label AS predicted, confidence, probs[place] AS own, likeliest,
                     list_select(probs, likeliest) AS likeliest_probs
              FROM (SELECT *, list_grade_up(probs, 'DESC', 'NULLS LAST')[1:{KEYS}] AS likeliest FROM scored WHERE label IS NOT NULL) scored
              LEFT JOIN class ON name = {LABEL}"""  # noqa: S608  only our words
    )
    [(num_predicted, num_labelled)] = db.execute("SELECT count(*), count(own) FROM candidate").fetchall()
    by = config.by or ("loss" if num_labelled else "uncertain")
    if by == "loss" and not num_labelled:
        raise ValueError(f"no predicted image of {name} has a label of the model: use --by uncertain or --by random")
    if not num_predicted:
        raise ValueError(f"no image of {name} was predicted: there is nothing to look at")
    found = db.execute(
        f"""SELECT uri, etag, label, predicted, confidence, own, likeliest FROM candidate
            WHERE own IS NOT NULL OR NOT $labelled ORDER BY {ORDERS[by]}, uri LIMIT $count""",  # noqa: S608  only our words
        {"labelled": by == "loss", "count": config.worst} | ({"seed": str(config.seed)} if by == "random" else {}),
    ).fetchall()
    candidates = [
        Candidate(*row, likeliest=[known for place in places if (known := classes[place - 1])])
        for *row, places in found
    ]
    return by, candidates, num_labelled if by == "loss" else num_predicted


def _offered(db: duckdb.DuckDBPyConnection, classes: list[str | None]) -> list[str]:
    """The classes that a person can choose: the model's as far as rows name them, then further ones of the labels."""
    labels = db.execute(f"SELECT DISTINCT {LABEL} FROM scored WHERE {LABEL} IS NOT NULL ORDER BY 1").fetchall()  # noqa: S608
    return list(dict.fromkeys([*(name for name in classes if name), *(label for (label,) in labels)]))
