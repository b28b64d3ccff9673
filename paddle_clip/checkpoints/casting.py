"""The dtypes of checkpoints, and casts between them.

numpy lacks bfloat16: it is held as uint16, which is Paddle's convention.
"""

import math
from collections.abc import Iterator

import numpy as np

from ..errors import CheckpointError


def _opaque(name: str, size: int = 1) -> np.dtype:
    """A dtype that NumPy lacks and no weights of ours have: its numbers are not looked at, only its name is told."""
    return np.dtype([(name, f"V{size}")])


def foreign(name: str) -> np.ndarray:
    """An array that stands for one of a dtype or a form that no weights of ours have, such as "float8_e4m3fn"."""
    return np.zeros((), _opaque(name))


BFLOAT16 = np.dtype("<u2")
TORCH_DTYPES: dict[str, np.dtype] = {
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.BFloat16Storage": BFLOAT16,
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
    "torch.ComplexFloatStorage": _opaque("complex64", 8),
    "torch.ComplexDoubleStorage": _opaque("complex128", 16),
    "torch.QInt8Storage": _opaque("qint8"),
    "torch.QUInt8Storage": _opaque("quint8"),
    "torch.QInt32Storage": _opaque("qint32", 4),
    "torch.QUInt4x2Storage": _opaque("quint4x2"),
    "torch.QUInt2x4Storage": _opaque("quint2x4"),
    "torch.storage.UntypedStorage": _opaque("untyped"),
}
SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "U16": _opaque("uint16", 2),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "C64": _opaque("complex64", 8),
    "F8_E4M3": _opaque("float8_e4m3"),
    "F8_E5M2": _opaque("float8_e5m2"),
    "F8_E8M0": _opaque("float8_e8m0"),
}

_PART = 1 << 20  # numbers written at once
_BLOCK = 1 << 17  # numbers widened at once: they stay in the cache
_STRIP = 16  # numbers of a row transposed at once: a cache line of the result
_HALF_SCALE = np.float32(2.0**112)


def dtype_name(dtype: np.dtype) -> str:
    """The name of a dtype, where uint16 stands for bfloat16."""
    if dtype.names:
        return dtype.names[0]
    return "bfloat16" if dtype == BFLOAT16 else dtype.name


def result_dtype(dtype: np.dtype, target: str) -> np.dtype:
    """The dtype of the array that `cast` returns."""
    if target == "keep":
        return dtype
    return BFLOAT16 if target == "bfloat16" else np.dtype(target)


def cast(array: np.ndarray, dtype: str, name: str = "an array") -> np.ndarray:
    """A copy or view of a floating-point array in another dtype, rounded to nearest even.

    float64 goes to bfloat16 by way of float32.

    Args:
        array: float16, float32 or float64, or uint16, which stands for bfloat16.
        dtype: "float32", "float64", "float16", "bfloat16" (the result is uint16), or "keep".
        name: name of the array, for messages.

    Raises:
        CheckpointError: if a finite number is too large for the dtype.
    """
    if dtype == "keep" or dtype == dtype_name(array.dtype):
        return array
    if array.dtype == BFLOAT16:
        array = np.asarray(array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        result = array.astype(np.float32 if dtype == "bfloat16" else dtype, order="C")
        if dtype == "bfloat16":
            result = _to_bfloat16(result)
    if result.itemsize < array.itemsize:
        exponent = np.uint16(0x7F80)  # all ones: an infinity or a NaN
        finite = (result & exponent) != exponent if dtype == "bfloat16" else np.isfinite(result)
        if not np.array_equal(np.isfinite(array), finite):
            raise CheckpointError(
                f"{name} has numbers too large for {dtype}; convert with dtype='float32' or dtype='keep'"
            )
    return result


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    """The upper halves of the bits of float32 numbers, rounded to nearest even."""
    bits = array.view(np.uint32)
    rounded = np.where(np.isnan(array), bits | 0x400000, bits + 0x7FFF + (bits >> 16 & 1))  # a NaN stays one
    return np.asarray(rounded >> 16).astype(BFLOAT16)


class Widener:
    """Widens float16 to float32 in parts: numpy's own cast would be the slowest step of a conversion.

    The bits of a float16, moved to their places in a float32, give its value divided by 2^112; only infinities and NaNs
    need more work. The memory is reused: new pages would cost more than the cast.
    """

    def __init__(self) -> None:
        self._part = np.empty(_PART, np.float32)
        self._block = np.empty(_BLOCK, np.float32)
        # Tested in this thread: another library may have told the processor to flush subnormal numbers to zero.
        self._subnormals_are_zero = np.array(1 << 13, np.int32).view(np.float32) * _HALF_SCALE == 0

    def parts(self, array: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the array's rows in order, in contiguous parts; each part is overwritten by the next."""
        if array.flags.c_contiguous:
            array = array.reshape(-1)
        height = max(1, _PART // max(1, math.prod(array.shape[1:])))
        for start in range(0, len(array), height):
            rows = array[start : start + height]
            if rows.size > self._part.size:
                self._part = np.empty(rows.size, np.float32)
            part = self._part[: rows.size].reshape(rows.shape)
            if rows.ndim == 1 and not self._subnormals_are_zero:
                for at in range(0, rows.size, _BLOCK):
                    self._widen(part[at : at + _BLOCK], rows[at : at + _BLOCK])
            elif self._is_transposed(rows) and not self._subnormals_are_zero:
                self._transpose(part, rows.T)
            else:
                np.copyto(part, rows)
            yield part

    def _is_transposed(self, array: np.ndarray) -> bool:
        return array.ndim == 2 and array.strides[0] == array.itemsize and len(array) <= self._block.size

    def _transpose(self, part: np.ndarray, array: np.ndarray) -> None:
        height = self._block.size // array.shape[1]
        for start in range(0, len(array), height):
            rows = array[start : start + height]
            block = self._block[: rows.size].reshape(rows.shape)
            self._widen(block, rows)
            for at in range(0, len(rows), _STRIP):
                strip = block[at : at + _STRIP].T
                np.copyto(part[:, start + at : start + at + strip.shape[1]], strip)

    @staticmethod
    def _widen(result: np.ndarray, halves: np.ndarray) -> None:
        bits = result.view(np.int32)
        np.copyto(bits, halves.view(np.int16))  # numpy extends the sign
        bits <<= 13
        bits &= np.int32(-0x70002000)  # 0x8FFFE000: sign, exponent, mantissa
        result *= _HALF_SCALE
        if result.max() >= 65536 or result.min() <= -65536:  # float16's infinities and NaNs
            bits[np.abs(result) >= 65536] |= 0x7F800000
