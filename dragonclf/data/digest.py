"""One digest for all rows of a table that is seen in pieces, whatever the pieces are."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class RowDigest:
    """SHA-256 over names, types and every cell of tables with one schema, in their order.

    Each column has three streams of its own: which cells are there, how long they are, what they hold. A stream does not show where
    tables ended, and the three tell each cell, so equal digests mean equal rows, and no other cut changes them.
    """

    def __init__(self) -> None:
        self._schema: pa.Schema | None = None
        self._streams: list[tuple[hashlib._Hash, hashlib._Hash, hashlib._Hash]] = []

    def update(self, table: pa.Table) -> None:
        """Take in the rows of one more table."""
        if self._schema is None:
            self._schema = table.schema.remove_metadata()
            self._streams = [(hashlib.sha256(), hashlib.sha256(), hashlib.sha256()) for _ in table.columns]
        assert table.schema.remove_metadata() == self._schema, "all tables have one schema"
        for column, streams in zip(table.columns, self._streams, strict=True):
            for chunk in column.chunks:
                for stream, data in zip(streams, _cells(chunk), strict=True):
                    stream.update(data)

    def hexdigest(self) -> str:
        """The digest of all rows so far. No table at all has one too."""
        whole = hashlib.sha256(repr([(field.name, str(field.type)) for field in self._schema or ()]).encode())
        for streams in self._streams:
            for stream in streams:
                whole.update(stream.digest())
        return whole.hexdigest()


def _cells(column: pa.Array) -> tuple[bytes | memoryview, bytes | memoryview, bytes | memoryview]:
    """Which cells are there (a byte each), their lengths (8 bytes each; none for numbers), their contents."""
    there = column.is_valid().to_numpy(zero_copy_only=False).astype(np.uint8).data
    kind = column.type
    if pa.types.is_string(kind):
        filled = column.fill_null("")
        lengths = pc.binary_length(filled).to_numpy(zero_copy_only=False).astype(np.int64)  # pyright: ignore[reportAttributeAccessIssue]
        _, offsets, contents = filled.buffers()
        if contents is None or not len(filled):
            return there, lengths.data, b""
        bounds = np.frombuffer(offsets, np.int32)[filled.offset : filled.offset + len(filled) + 1]
        return there, lengths.data, memoryview(contents)[bounds[0] : bounds[-1]]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return (
            there,
            b"",
            np.ascontiguousarray(column.fill_null(pa.scalar(0).cast(kind)).to_numpy(zero_copy_only=False)).data,
        )
    words = [repr(cell).encode() for cell in column.to_pylist()]
    return there, np.array([len(word) for word in words], np.int64).data, b"".join(words)
