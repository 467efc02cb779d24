"""Parquet through `storage`: whole tables, and the footer alone."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from dragonclf import storage

FOOTER_BYTES = 64 * 1024


def encode(table: pa.Table, *, metadata: dict[str, str] | None = None) -> bytes:
    """Return the table as one Parquet file, with `metadata` added to its footer. Equal tables give equal bytes."""
    buffer = io.BytesIO()
    if metadata:
        table = table.replace_schema_metadata(
            (table.schema.metadata or {}) | {k.encode(): v.encode() for k, v in metadata.items()}
        )
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read(uri: str, *, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file. ValueError if it is not one."""
    return decode(storage.get(uri), uri, columns=columns)


def decode(data: bytes, name: str, *, columns: list[str] | None = None) -> pa.Table:
    """The table in a Parquet file's bytes. ValueError, with the file's `name`, if it is none."""
    try:
        return pq.read_table(io.BytesIO(data), columns=columns)
    except (pa.ArrowInvalid, OSError) as error:  # OSError: damaged pages
        raise ValueError(f"{name} is not a Parquet file that can be read: {error}") from error


def read_footer(uri: str) -> tuple[int, dict[str, str]]:
    """Return (number of rows, metadata) of a Parquet file, reading its last bytes only. ValueError if it is not whole."""
    size = FOOTER_BYTES
    while True:
        tail = storage.get(uri, last_bytes=size)
        wanted = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != b"PAR1" or (wanted > len(tail) and len(tail) < size):
            raise ValueError(f"{uri} is not a whole Parquet file: delete it and run the command again")
        if wanted <= len(tail):
            break
        size = wanted
    try:
        footer = pq.read_metadata(io.BytesIO(tail))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{uri} is not a whole Parquet file: delete it and run the command again") from error
    metadata: dict[bytes, bytes] = footer.metadata or {}
    return footer.num_rows, {
        key.decode(): value.decode() for key, value in metadata.items() if not key.startswith(b"ARROW:")
    }
