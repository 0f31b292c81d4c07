"""Register-to-register instructions of PTX, for `ptx.py`: values are uint64, of which a type names the low bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any
COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
BITWISE: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def signed_fields(words: Array, bits: int) -> Array:
    """Two's complement fields of 32-bit words, lowest first: (..., 32 / bits)."""
    shifts = np.arange(0, 32, bits, dtype=np.uint64)
    fields = ((words[..., None] >> shifts) & np.uint64(2**bits - 1)).astype(np.int64)
    return np.where(fields >= 2 ** (bits - 1), fields - 2**bits, fields)


def sign_extend(values: Array, width: int) -> Array:
    """The low `width` bits as int64."""
    shift = np.int64(64 - width)
    return (values.view(np.int64) << shift) >> shift


def as_float(values: Array) -> Array:
    """The low 32 bits as float32."""
    return (values & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.float32)


def from_float(values: Array) -> Array:
    """Bits of float32 or float16 values."""
    return values.view(np.uint32 if values.dtype == np.float32 else np.uint16).astype(np.uint64)


def half(values: Array) -> Array:
    """float32 to the bits of float16, rounding to nearest even, overflow to infinity."""
    with np.errstate(over="ignore"):
        return from_float(as_float(values).astype(np.float16))


def compute(name: str, inputs: list[Array]) -> Array:
    """Register-to-register instructions, on the low bits that the type names; results are zero-extended."""
    parts = name.split(".")
    operation, kind = parts[0], parts[-1]
    if kind == "pred":
        truth = [item.astype(bool) for item in inputs]
        if operation in BITWISE:
            return BITWISE[operation](truth[0], truth[1]).astype(np.uint64)
        return (~truth[0] if operation == "not" else truth[0]).astype(np.uint64)
    width = int(kind[1:])
    mask = np.uint64(2**width - 1)
    if operation == "cvt":
        if name == "cvt.rn.f32.s32":
            return from_float(sign_extend(inputs[0], 32).astype(np.float32))
        if name == "cvt.rn.f16.f32":
            return half(inputs[0])
        if name == "cvt.rn.f16x2.f32":  # the first operand is the upper half
            return half(inputs[1]) | half(inputs[0]) << np.uint64(16)
        if parts[1][0] == kind[0] == "u":
            return inputs[0] & np.uint64(2 ** min(width, int(parts[1][1:])) - 1)
    if operation == "mul" and kind == "f32":
        with np.errstate(over="ignore"):
            return from_float(as_float(inputs[0]) * as_float(inputs[1]))
    if operation in ("mov", "cvta"):
        return inputs[0] & mask
    if operation in BITWISE:
        return BITWISE[operation](inputs[0], inputs[1]) & mask
    if operation == "selp":
        return np.where(inputs[2].astype(bool), inputs[0], inputs[1]) & mask
    if operation == "setp":
        first, second = (sign_extend(item, width) if kind[0] == "s" else item & mask for item in inputs)
        return COMPARE[parts[1]](first, second).astype(np.uint64)
    if name == "lop3.b32":  # bit i of the table is the result where the inputs' bits spell i
        result = np.zeros_like(inputs[0])
        for index in (index for index in range(8) if int(inputs[3][0]) >> index & 1):
            bits = (item if index & place else ~item for item, place in zip(inputs[:3], (4, 2, 1), strict=True))
            result |= np.bitwise_and.reduce(list(bits))
        return result & mask
    if operation in ("add", "sub"):
        return (inputs[0] + inputs[1] if operation == "add" else inputs[0] - inputs[1]) & mask
    if name.startswith(("mul.lo", "mad.lo")):
        return (inputs[0] * inputs[1] + (inputs[2] if operation == "mad" else np.uint64(0))) & mask
    if name == "mul.hi.u32":
        return ((inputs[0] & mask) * (inputs[1] & mask)) >> np.uint64(32)
    if name.startswith("mul.wide.u"):
        return (inputs[0] & mask) * (inputs[1] & mask)
    if operation in ("shl", "shr") and kind[0] in "bu":
        amount = np.minimum(inputs[1], np.uint64(63))
        shifted = (inputs[0] & mask) << amount if operation == "shl" else (inputs[0] & mask) >> amount
        return np.where(inputs[1] >= width, np.uint64(0), shifted) & mask
    if operation in ("min", "max") and kind[0] == "u":
        return (np.minimum if operation == "min" else np.maximum)(inputs[0] & mask, inputs[1] & mask)
    if name == "bfi.b32":  # inserts the low bits of the first into the second
        field = ((np.uint64(1) << inputs[3]) - np.uint64(1)) << inputs[2]
        return ((inputs[1] & ~field) | ((inputs[0] << inputs[2]) & field)) & mask
    raise NotImplementedError(name)
