"""Patches Triton's interpreter to compute like a GPU. On a GPU the package needs no patch.

As of triton 3.6, the interpreter's `tl.dot` multiplies the bit patterns of bfloat16 operands and does not emulate TF32.
Its casts from float32 truncate, its fused multiply-add rounds twice, its exp2 keeps denormal results, which a GPU
flushes to 0, and its maximum of a number and NaN is NaN. It also copies every argument onto itself after a call, since
it expects tensors on a GPU.
"""

import numpy as np
import triton.language as tl
from triton._C.libtriton.ir import INPUT_PRECISION as PRECISION
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, interpreter_builder


def _widened(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _rounded(data: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16's bits, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


def _cast(self, source, to):
    from_type, to_type = source.dtype.scalar, to.scalar
    if (from_type, to_type) == (tl.bfloat16, tl.float32):
        return TensorHandle(_widened(source.data), to_type)
    if (from_type, to_type) == (tl.float32, tl.bfloat16):
        return TensorHandle(_rounded(source.data), to_type)
    return _original_cast(self, source, to)


def _dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc):
    def operand(handle):
        return _widened(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data.astype(np.float32)

    x, y, total = operand(a), operand(b), accumulator.data
    if a.dtype.scalar == tl.float32 and input_precision != PRECISION.IEEE:
        high_x, high_y = _truncated(x), _truncated(y)
        with np.errstate(invalid="ignore"):  # inf − inf
            low_x, low_y = _truncated(x - high_x), _truncated(y - high_y)
        if input_precision == PRECISION.TF32x3:
            total = np.matmul(low_x, high_y) + np.matmul(high_x, low_y) + total
        x, y = high_x, high_y
    return TensorHandle(np.matmul(x, y) + total, accumulator.dtype.scalar)


def _truncated(data: np.ndarray) -> np.ndarray:
    """float32 truncated as in TF32 products, to 11 of its 24 significant bits."""
    return (np.ascontiguousarray(data).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _fma(self, a, b, c):
    exact = a.data.astype(np.float64) * b.data.astype(np.float64) + c.data.astype(np.float64)
    return TensorHandle(exact.astype(a.data.dtype), a.dtype.scalar)


_original_cast = InterpreterBuilder.cast_impl


def _exp2(self, argument):
    """exp2 like ex2.approx.ftz: results below the smallest normal number are 0."""
    with np.errstate(over="ignore"):
        result = np.exp2(argument.data)
    if result.dtype == np.float32:
        result = np.where(result < np.finfo(np.float32).tiny, np.float32(0), result)  # NaN stays
    return TensorHandle(result, argument.dtype.scalar)


def _larger(self, a, b):
    """Maximum like max.f32: of a number and NaN, it is the number."""
    return self.binary_op(a, b, np.fmax)


def _smaller(self, a, b):
    return self.binary_op(a, b, np.fmin)


def repair() -> None:
    InterpreterBuilder.create_maxnumf = _larger
    InterpreterBuilder.create_minnumf = _smaller
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.create_fma = _fma
    InterpreterBuilder.create_exp2 = _exp2
    GridExecutor._restore_args_dev = lambda *_: None


def run_program(kernel, program: tuple[int, int], *arguments, **constants) -> None:
    """Run a single program of a grid."""
    original = interpreter_builder.set_grid_idx
    interpreter_builder.set_grid_idx = lambda *_: setattr(interpreter_builder, "grid_idx", (*program, 0))
    try:
        kernel[(1,)](*arguments, **constants)
    finally:
        interpreter_builder.set_grid_idx = original
