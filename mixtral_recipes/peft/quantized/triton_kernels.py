"""The Triton kernels that `kernels.py` starts; the only file that needs Triton.

Their arguments have no types: Triton's compiler reads what stands there, and refuses whatever is not its own.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
import triton
import triton.language as tl


@triton.jit
def nf4(
    codes,
    absmax,
    nested,
    offset,
    quantiles,
    levels,
    out,
    total,
    columns,
    half,
    whole_half,
    first_row,
    whole_columns,
    first_column,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Some blocks of a matrix: each one's scale, then its weights, two of a byte side by side.

    ``total`` and ``columns`` count blocks; the five numbers that follow are `Split.place`'s.
    """
    number = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = number < total
    row, column = number // columns, number % columns
    upper = row // half
    place = (upper * whole_half + first_row + row - upper * half) * whole_columns + first_column + column
    level = tl.load(levels + tl.load(absmax + number, there, 0).to(tl.int32))
    scale = level * tl.load(nested + place // NESTED, there, 0.0) + tl.load(offset)
    bytes_ = number[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    packed = tl.load(codes + bytes_, there[:, None], 0).to(tl.int32)
    first = tl.load(quantiles + (packed >> 4)) * scale[:, None]
    second = tl.load(quantiles + (packed & 15)) * scale[:, None]
    weights = number[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    both = tl.reshape(tl.join(first, second), (BLOCKS, BLOCK))
    tl.store(out + weights, both.to(out.dtype.element_ty), there[:, None])


@triton.jit
def int8(codes, absmax, out, columns, COLUMNS: tl.constexpr):
    """A stretch of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < columns
    values = tl.load(codes + row * columns + column, there, 0).to(tl.float32)
    values = values * tl.load(absmax + row) * 7.874015718698502e-3
    tl.store(out + row * columns + column, values.to(out.dtype.element_ty), there)
