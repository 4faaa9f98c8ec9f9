"""The one argument of a kernel: a record of 8-byte integers and floats.

``launch.py`` packs it up to SUMS, its callers the rest. Addresses are 0 where a tensor is absent.
"""

(
    # geometry
    UNITS,  # how many strips of columns the tensor is cut into; one channel each in the rows form
    ROWS,
    ROW_STRIDE,  # elements from one row to the next
    WIDTH,  # columns of a strip; the last strip may have fewer
    COLUMNS,  # of all strips
    SPATIAL,  # neighbouring columns that belong to one channel
    CHANNELS,
    CHUNKS,  # pieces of a strip: what one partial sum covers
    CHUNK_ROWS,
    SEGMENTS,  # pieces of a row, where a row alone is longer than a piece should be
    SEGMENT,  # columns of a segment
    TILES,  # rows of one channel per column that were joined to one longer row
    TOTAL,  # elements of the tensor
    STREAM,  # large: what is written is not read again before it left the caches
    SCRATCH_BYTES,  # private memory of a thread
    # the thread pool: addresses of its functions, 0 for a serial run
    THREAD_NUM,
    NUM_THREADS,
    BARRIER,
    # how to run
    BLOCKED,  # several threads share a strip
    SCRATCH,
    PARTIALS,
    SUMS,  # float64 (2, C): sum_dy and sum_dy_xmu
    REDUCE,  # phases
    APPLY,
    GIVEN,  # which statistics normalize: one of the constants below
    COUNT,  # values per channel, of all ranks where statistics are shared
    EPS,
    MOMENTUM,
    # tensors
    X,
    RESIDUAL,
    MASK,
    WEIGHT,
    BIAS,
    SAVED,  # float64 (2, C): mean and 1 / sqrt(var + eps)
    # of the forward pass
    Y,
    MEAN,
    VAR,
    RUNNING_MEAN,
    RUNNING_VAR,
    COUNTER,  # num_batches_tracked
    # of the backward pass
    GRAD_OUTPUT,
    GRAD_INPUT,
    GRAD_RESIDUAL,
    GRAD_WEIGHT,
    GRAD_BIAS,
    SLOTS,
) = range(46)

BATCH, RUNNING, SAVED_BEFORE = range(3)
