"""Pieces of kernels: where rows lie, tiles of rows, dot products over a width in blocks, masks.

A tensor reaches a kernel as a tuple: the pointer, the strides of the two batch dimensions, then, of a token tensor, the
strides of the folded dimension and of T; of a memory tensor, the stride of N. The last dimension is contiguous. Offsets
are 64-bit; tokens and slots are counted in 32 bits.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def batch(x, b, B1):
    """The pointer of batch ``b`` of tensor ``x``."""
    return x[0] + (b // B1).to(tl.int64) * x[1] + (b % B1).to(tl.int64) * x[2]


@triton.jit
def tokens(x, b, B1, t, inner):
    """Pointers of tokens ``t`` of batch ``b``. inner: T where leading dimensions are folded in front of it, or None."""
    start = batch(x, b, B1)
    if inner is None:
        return start + t.to(tl.int64) * x[4]
    else:
        return start + (t // inner).to(tl.int64) * x[3] + (t % inner).to(tl.int64) * x[4]


@triton.jit
def slots(x, b, B1, n):
    """Pointers of slots ``n`` of batch ``b``."""
    return batch(x, b, B1) + n.to(tl.int64) * x[3]


@triton.jit
def tile(rows, ok, D, start, BLOCK: tl.constexpr):
    """Columns ``start .. start + BLOCK`` of rows: [rows, BLOCK], zero where not ``ok`` or past ``D``."""
    d = start + tl.arange(0, BLOCK)
    return tl.load(rows[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def put(rows, ok, D, start, x, BLOCK: tl.constexpr):
    """Store [rows, BLOCK] into columns ``start .. start + BLOCK`` of rows, in the dtype of the memory."""
    d = start + tl.arange(0, BLOCK)
    tl.store(rows[:, None] + d[None, :], x.to(rows.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])


@triton.jit
def slot_block(x, b, B1, n, ok, D, BLOCK: tl.constexpr):
    """Rows of slots ``n`` of memory ``x``, and their first BLOCK columns."""
    if x is None:  # what a variant of a kernel does without: nothing looks at these
        return n, n
    else:
        rows = slots(x, b, B1, n)
        return rows, tile(rows, ok, D, 0, BLOCK)


@triton.jit
def token_block(x, b, B1, t, inner, ok, D, BLOCK: tl.constexpr):
    """Rows of tokens ``t``, and their first BLOCK columns."""
    rows = tokens(x, b, B1, t, inner)
    return rows, tile(rows, ok, D, 0, BLOCK)


@triton.jit
def decoded(x, dtype: tl.constexpr):
    """8-bit numbers in ``dtype``, which holds each exactly: int8, or the bits of float8_e4m3fn in uint8, which are
    those of a float16 of 1/256 its size and need no conversion that only newer GPUs have. Others as they are."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        number = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), number).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def row_scales(scales, b, B1, n, ok):
    """What multiplies the rows of compressed slots ``n``."""
    return tl.load(slots(scales, b, B1, n), mask=ok, other=0.0)


@triton.jit
def scaled(x, scales, dtype: tl.constexpr):
    """Compressed rows multiplied out, in ``dtype``."""
    return (decoded(x, tl.float32) * scales[:, None]).to(dtype)


@triton.jit
def product(x, y, acc, PRECISION: tl.constexpr):
    """acc + x @ y; 8-bit operands take the dtype of the other, operands of different dtypes meet in float32."""
    if x.dtype == tl.uint8 or x.dtype == tl.int8:
        x = decoded(x, y.dtype)
    if y.dtype == tl.uint8 or y.dtype == tl.int8:
        y = decoded(y, x.dtype)
    if x.dtype != y.dtype:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def dots(x, x_rows, x_ok, y, y_rows, y_ok, D, BLOCK: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr):
    """<x_i, y_j> in float32: [x rows, y rows]. x, y: the first BLOCK columns, already loaded; the rest is read here."""
    acc = tl.zeros([x.shape[0], y.shape[0]], tl.float32)
    acc = product(x, tl.trans(y), acc, PRECISION)
    if STEPS > 1:
        # Up to D, not STEPS: a loop of known length is unrolled, and so many loads at once spill.
        for step in range(1, tl.cdiv(D, BLOCK)):
            more_x = tile(x_rows, x_ok, D, step * BLOCK, BLOCK)
            more_y = tile(y_rows, y_ok, D, step * BLOCK, BLOCK)
            acc = product(more_x, tl.trans(more_y), acc, PRECISION)
    return acc


@triton.jit
def columns(first, rows, ok, D, start, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Columns from ``start`` of rows of which ``first`` is the first block: loaded only where they are not those."""
    if STEPS == 1:
        return first
    else:
        return tile(rows, ok, D, start, BLOCK)


@triton.jit
def open_slots(mask, b, B1, n, N):
    """Which slots exist and may be addressed, and what the mask adds to their scores."""
    ok = n < N
    bias = tl.zeros(n.shape, tl.float32)
    if mask is not None:
        value = tl.load(slots(mask, b, B1, n), mask=ok, other=0)
        if mask[0].dtype.element_ty == tl.uint8:
            ok = ok & (value != 0)
        else:
            bias = value.to(tl.float32)
            ok = ok & (bias != float("-inf"))
    return ok, tl.where(ok, bias, 0.0)


@triton.jit
def scores(dot, scale, bias):
    """scale <q, k> + mask, natural, as a rounded number.

    Were the product left to the compiler, it might contract it with the subtraction of the maximum or the lse that
    follows. Those are rounded, and at scores of 1e9 the difference would be off by tens. Units of log2 are for
    differences alone: a score in them overflows at 0.69 of the largest number, and is rounded once more.
    """
    return tl.fma(dot, scale, bias)


@triton.jit
def weigh(s, m, total):
    """One step of a softmax whose scores come block after block: weights against the running maximum ``m``, what
    shrinks earlier ones, the maximum and the sum ``total`` moved on."""
    highest = tl.maximum(m, tl.max(s, 1))
    base = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
    p = tl.exp2((s - base[:, None]) * LOG2E)
    shrink = tl.exp2((m - base) * LOG2E)
    return p, shrink, highest, total * shrink + tl.sum(p, 1)


@triton.jit
def log_total(m, total):
    """The log-sum-exp at the end of such a softmax, and what its rounding left out; -inf and 0 of nothing."""
    base = tl.where(tl.abs(m) == float("inf"), 0.0, m)
    log = tl.log2(tl.where(total == 0, 1.0, total)) * LN2
    lse = tl.where(total == 0, float("-inf"), base + log)
    return lse, tl.where(tl.abs(lse) == float("inf"), 0.0, (base - lse) + log)


@triton.jit
def softmax_weights(s, lse, rest):
    """exp(s - lse) of scores computed again, ``rest`` being what the rounding of lse left out. Such a score may be
    rounded another way than the one in the lse: at 1e9 by tens, so a weight ends at 1. NaN stays NaN."""
    return tl.minimum(tl.exp2((s - lse) * LOG2E - rest * LOG2E), 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add(total, lost, x):
    """total + x, and what its rounding lost, which the next call takes: so errors do not grow with the count of terms
    (Kahan 1965)."""
    x -= lost
    new = total + x
    lost = (new - total) - x
    return new, tl.where(lost == lost, lost, 0.0)  # of infinite sums NaN


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exact at infinities, and 1 - sigmoid(x) is sigmoid(-x)."""
    small = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x >= 0, 1.0 / (1.0 + small), small / (1.0 + small))


@triton.jit
def tanh_slope(x):
    """tanh(x) and its derivative 1 - tanh(x)^2, which loses no digits where it is small."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    h = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -h, h), 4.0 * e / ((1.0 + e) * (1.0 + e))
