"""What is wrong with a labelled set: images that cannot be read or hardly be seen, copies, odd shapes. Out of core, by DuckDB.

The rules are CleanVision's where there is one (0.3.7): an odd aspect, an odd size. Its limits of blur and darkness are absolute and need
other statistics of the pixels; here an image is blurred beside the others of its set, so that pictures which are soft by nature are not,
and dark by its mean. Its near duplicates are pictures of one 64-bit hash; ours differ in 10 of 256 bits at most.

A million images with the hashes of photographs that are much alike take two minutes on two busy cores, and 1.7 GB. Time and disk grow with
the number of near pairs: with the square of the frames of a camera that stands still.
"""

from collections.abc import Iterable

import duckdb
import pyarrow as pa

from dragonclf.data.measures import HASH_BITS
from dragonclf.data.snapshot import MEASURES

COLUMNS = ["uri", "label", "split", "width", "height", "sha256", *MEASURES, "status", "error"]

# Of re-encoded copies of 300 elpv photographs, 99 % are as near (JPEG of quality 85, or 0.9 times as large), 90 % at quality 50 or half the
# size; of all pairs of its 2,624 photographs 53 are, each of one cell.
MAX_DISTANCE = 10
LIMITS = {
    "dark": 0.1,  # of brightness
    "blurred": -3.5,  # robust z-score (Iglewicz, Hoaglin, 1993) of the logarithm of sharpness
    "odd_aspect": 0.35,  # of the shorter side beside the longer one
    "odd_size": 3.0,  # interquartile ranges beyond the quartiles, of the square root of width x height
}

# Hashes that differ in 10 of their 64 digits at most are equal in one of 11 bands of digits: only these are compared (Norouzi, Punjani,
# Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012). A band's digits lie apart, since neighbours are often alike.
_DIGITS, _NUM_BANDS = HASH_BITS // 4, MAX_DISTANCE + 1
_BANDS = [range(first, _DIGITS + 1, _NUM_BANDS) for first in range(1, _NUM_BANDS + 1)]  # SQL counts from 1
_WORDS = range(1, _DIGITS, 16)

# What each issue adds to the columns of its images: score, other, detail, and a key that ranks. In the order of what they cost a model.
_ISSUES = {
    "unreadable": """
        SELECT *, NULL AS score, NULL AS other, concat_ws(': ', status, error) AS detail, status AS key FROM image WHERE status <> 'ok'""",
    "label_conflict": """
        SELECT *, other_than(label, first_label, last_label) AS twin, abs(twin['distance']) AS score, twin['uri'] AS other,
               'labelled ' || twin['value'] AS detail, score AS key
        FROM usable JOIN circle USING (look) WHERE twin IS NOT NULL""",
    "across_splits": """
        SELECT *, other_than(split, first_split, last_split) AS twin, abs(twin['distance']) AS score, twin['uri'] AS other,
               'in ' || twin['value'] AS detail, score AS key
        FROM usable JOIN circle USING (look) WHERE twin IS NOT NULL""",
    "exact_duplicate": """
        SELECT *, count(*) OVER copies AS score, if(uri = min(uri) OVER copies, max(uri) OVER copies, min(uri) OVER copies) AS other,
               NULL AS detail, (-score, sha256) AS key
        FROM usable WINDOW copies AS (PARTITION BY sha256) QUALIFY score > 1""",
    "near_duplicate": """
        SELECT *, coalesce(other_than(sha256, first_content, last_content), nearest) AS twin, abs(twin['distance']) AS score,
               twin['uri'] AS other, NULL AS detail, score AS key
        FROM usable JOIN circle USING (look) WHERE twin IS NOT NULL""",
    "flat": """
        SELECT *, brightness AS score, NULL AS other, NULL AS detail, score AS key FROM usable WHERE sharpness IS NULL""",
    "dark": """
        SELECT *, brightness AS score, NULL AS other, NULL AS detail, score AS key FROM usable WHERE score < getvariable('dark')""",
    "blurred": """
        WITH log AS (SELECT *, ln(greatest(sharpness, 1e-6)) AS log FROM usable WHERE sharpness IS NOT NULL),
             whole AS (SELECT median(log) AS middle, 1.4826 * mad(log) AS spread FROM log)
        SELECT log.*, (log - middle) / nullif(spread, 0) AS score, NULL AS other, 'sharpness ' || sharpness AS detail, score AS key
        FROM log, whole WHERE score < getvariable('blurred')""",
    "odd_size": """
        WITH side AS (SELECT *, sqrt(width::DOUBLE * height) AS side FROM usable),
             whole AS (SELECT quantile_cont(side, 0.25) AS q1, median(side) AS middle, quantile_cont(side, 0.75) AS q3 FROM side)
        SELECT side.*, side / middle AS score, NULL AS other, width || ' x ' || height AS detail, -abs(ln(score)) AS key
        FROM side, whole
        WHERE greatest(q1 - side, side - q3) > getvariable('odd_size') * (q3 - q1)""",
    "odd_aspect": """
        SELECT *, least(width / height, height / width) AS score, NULL AS other, width || ' x ' || height AS detail, score AS key
        FROM usable WHERE score < getvariable('odd_aspect')""",
}
ISSUES = tuple(_ISSUES)


def find_issues(db: duckdb.DuckDBPyConnection, rows: Iterable[pa.Table]) -> None:
    """Make the table ``issue`` of a snapshot's `rows` (`COLUMNS`): issue, rank (from 1), uri, label, split, score, other, detail.

    `other` is another image that the issue is about. `score` is what ranks: of copies their number; of near ones, of conflicts and of
    copies across splits the bits of the hash that differ; of a blurred image its z-score; of an odd size its side beside the middle one;
    of a dark or flat one its brightness; of an odd aspect its shorter side beside the longer one.
    """
    for number, table in enumerate(rows):
        db.register("batch", table.select(COLUMNS))
        db.execute("INSERT INTO image FROM batch" if number else "CREATE TABLE image AS FROM batch")
        db.unregister("batch")
    db.execute("ALTER TABLE image ADD COLUMN look VARCHAR")
    db.execute("UPDATE image SET look = coalesce(phash, sha256)")
    db.execute("CREATE VIEW usable AS FROM image WHERE status = 'ok'")
    _find_circles(db)
    db.execute("CREATE MACRO other_than(own, a, b) AS CASE WHEN own <> a.value THEN a WHEN own <> b.value THEN b END")
    for name, limit in LIMITS.items():
        db.execute(f"SET VARIABLE {name} = {limit}")
    db.execute(
        """CREATE TABLE issue (issue VARCHAR, rank BIGINT, uri VARCHAR, label VARCHAR, split VARCHAR, score DOUBLE, other VARCHAR,
                               detail VARCHAR)"""
    )
    for name, query in _ISSUES.items():
        db.execute(
            f"""INSERT INTO issue SELECT '{name}', row_number() OVER (ORDER BY key, uri), uri, label, split, score, other, detail
                FROM ({query})"""  # noqa: S608  queries of our own
        )


def _find_circles(db: duckdb.DuckDBPyConnection) -> None:
    """Make the table ``circle``: for each look (a hash) the images that share it or have one near it, as far as the issues need them.

    These are the first and last content of the look itself, the first and last label and split of all, each as {value, distance, uri}, and
    the nearest image of another look. What differs from an image's own label differs from the first or from the last one: no list is kept.
    """
    words = ", ".join(f"('0x' || substr(any_value(phash), {start}, 16))::UBIGINT AS word{start}" for start in _WORDS)
    bands = ", ".join(
        f"{' || '.join(f'look[{place}]' for place in places)} AS band{band}" for band, places in enumerate(_BANDS)
    )
    ends = ", ".join(
        f"""min({{'value': {column}, 'distance': 0, 'uri': uri}}) AS first_{name},
            max({{'value': {column}, 'distance': 0, 'uri': uri}}) AS last_{name}"""
        for name, column in (("content", "sha256"), ("label", "label"), ("split", "split"))
    )
    db.execute(
        f"""CREATE TABLE look AS SELECT row_number() OVER (ORDER BY look) AS id, look, min(uri) AS uri, {words}, {bands}, {ends}
            FROM usable GROUP BY look"""  # noqa: S608  names of our own
    )
    db.execute("CREATE TABLE near (a BIGINT, b BIGINT, distance BIGINT)")
    distance = " + ".join(f"bit_count(xor(a.word{start}, b.word{start}))::INTEGER" for start in _WORDS)
    for band in range(_NUM_BANDS):
        found = "".join(f" AND a.band{earlier} <> b.band{earlier}" for earlier in range(band))  # not in an earlier band
        db.execute(
            f"""INSERT INTO near SELECT a.id, b.id, {distance} AS distance FROM look AS a JOIN look AS b
                ON a.band{band} = b.band{band} AND a.id < b.id WHERE distance <= {MAX_DISTANCE}{found}"""  # noqa: S608  ours
        )
    met = ", ".join(
        f"""min({{'value': met.first_{name}.value, 'distance': distance, 'uri': met.first_{name}.uri}}) AS first_{name},
            max({{'value': met.last_{name}.value, 'distance': -distance, 'uri': met.last_{name}.uri}}) AS last_{name}"""
        for name in ("label", "split")
    )
    db.execute(
        f"""CREATE TABLE circle AS
            WITH pair AS (SELECT id AS a, id AS b, 0 AS distance FROM look
                          UNION ALL SELECT a, b, distance FROM near UNION ALL SELECT b, a, distance FROM near),
            of_id AS (SELECT pair.a AS id, {met},
                             min({{'distance': distance, 'uri': met.uri}}) FILTER (met.id <> pair.a) AS nearest
                      FROM pair JOIN look AS met ON met.id = pair.b GROUP BY pair.a)
            SELECT look.look, first_content, last_content, of_id.first_label, of_id.last_label, of_id.first_split, of_id.last_split,
                   CASE WHEN nearest IS NOT NULL THEN {{'value': '', 'distance': nearest.distance, 'uri': nearest.uri}} END AS nearest
            FROM of_id JOIN look USING (id)"""  # noqa: S608  names of our own
    )
