"""How a tensor is cut into strips, chunks and segments. What is summed together depends on the shape alone.

A dense tensor (N, C, *) is seen as rows of columns, in two forms:

    rows      contiguous, many positions per channel: a strip is one channel, its rows are the N samples
    columns   everything else: (N, C) and channels_last with one column per channel; contiguous with few positions,
              where a strip holds several channels and a row of it is long enough for SIMD code

A strip is summed in chunks of rows; a chunk has one partial sum (one per column in the columns form), and these are
added in the order of the chunks. So the bits of a result do not depend on the number of threads.
"""

from typing import NamedTuple

# From here on the rows form is faster: with shorter rows its loops spend their time in remainders.
ROWS_FORM_POSITIONS = 96
# Columns of a strip: what a thread keeps per column stays in the first-level cache.
STRIP_COLUMNS = 512
# Columns of a cache line, in float32.
LINE_COLUMNS = 16
# Columns of a row that a thread works on in one go.
BLOCK = 1024
CHUNK_ELEMENTS = 131072
LEAST_CHUNK_ELEMENTS = 32768
# Enough chunks for many threads come before long ones.
CHUNKS = 16
SEGMENT_ELEMENTS = 16384
# Short rows without a gap are joined to longer ones while this many rows remain.
LEAST_ROWS = 64
# private memory per column: sums, shifts, coefficients and results on their way, 8 bytes each
PER_COLUMN_BYTES = 10 * 8
# Results of more elements, 6 MB in float32, are written past the caches.
STREAM_ELEMENTS = 3 << 19


class Geometry(NamedTuple):
    """The cut of one shape; the names and their order are those of ``arguments.py``, where ``elements`` is TOTAL."""

    form: str
    units: int
    rows: int
    row_stride: int
    width: int
    columns: int
    spatial: int
    channels: int
    chunks: int
    chunk_rows: int
    segments: int
    segment: int
    tiles: int
    elements: int
    stream: bool
    scratch_bytes: int

    @property
    def partial_bytes(self) -> int:
        """Memory for the partial sums of all strips."""
        return self.units * self.chunks * 2 * 8 * (1 if self.form == "rows" else self.width)

    @property
    def mask_words(self) -> int:
        """Words of 32 bits that a mask of one bit per element takes, each piece of a row from a word of its own."""
        return self.rows * self.units * self.segments * words(self.segment)


def padded(size: int) -> int:
    """Whole cache lines, so that two threads never write to the same one."""
    return -(-size // 64) * 64


def words(elements: int) -> int:
    return -(-elements // 32)


def cut(samples: int, channels: int, positions: int, channels_last: bool) -> Geometry:
    """The cut of a tensor of ``samples`` x ``channels`` x ``positions``, none of them 0."""
    if not channels_last and positions >= ROWS_FORM_POSITIONS:
        return cut_into_rows(samples, channels, positions)
    elements = samples * channels * positions
    if channels_last:
        samples, positions = samples * positions, 1
    columns = channels * positions
    tiles = max(1, min(STRIP_COLUMNS // columns, samples // LEAST_ROWS)) if positions == 1 else 1
    samples, columns = -(-samples // tiles), columns * tiles
    # strips of about the same width, so that threads get the same work
    strips = -(-columns // (max(1, STRIP_COLUMNS // positions) * positions))
    width = -(-columns // (positions * strips)) * positions
    if positions == 1 and strips > 1:
        width = -(-width // LINE_COLUMNS) * LINE_COLUMNS
    chunk_elements = max(LEAST_CHUNK_ELEMENTS, min(CHUNK_ELEMENTS, elements // CHUNKS))
    chunk_rows = min(samples, max(1, chunk_elements // width))
    chunks = -(-samples // chunk_rows)
    return Geometry(
        form="columns",
        units=-(-columns // width),
        rows=samples,
        row_stride=columns,
        width=width,
        columns=columns,
        spatial=positions,
        channels=channels,
        chunks=chunks,
        chunk_rows=chunk_rows,
        segments=1,
        segment=width,
        tiles=tiles,
        elements=elements,
        stream=elements >= STREAM_ELEMENTS,
        scratch_bytes=padded(PER_COLUMN_BYTES * width + chunks * 16 * width),
    )


def cut_into_rows(samples: int, channels: int, positions: int) -> Geometry:
    segments = -(-positions // SEGMENT_ELEMENTS)
    # equal segments of whole cache lines
    segment = -(-positions // segments // 16) * 16 if segments > 1 else positions
    segments = -(-positions // segment)
    chunk_rows = 1 if segments > 1 else min(samples, max(1, LEAST_CHUNK_ELEMENTS // positions))
    chunks = -(-samples // chunk_rows) * segments
    return Geometry(
        form="rows",
        units=channels,
        rows=samples,
        row_stride=channels * positions,
        width=positions,
        columns=channels * positions,
        spatial=positions,
        channels=channels,
        chunks=chunks,
        chunk_rows=chunk_rows,
        segments=segments,
        segment=segment,
        tiles=1,
        elements=samples * channels * positions,
        stream=samples * channels * positions >= STREAM_ELEMENTS,
        scratch_bytes=padded(8 * BLOCK + 16 * chunks),
    )
