"""The dtypes of tensors: one table of their sizes, and of what each library calls them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DtypeRecord:
    """One dtype."""

    name: str
    """What torch, ONNX's numpy types and manifests call it."""
    bytes: int
    """Of one number."""
    code: str
    """In the header of a safetensors file."""
    onnx: str
    """The member of ONNX's enumeration of types."""
    array: str | None = None
    """The numpy type of the same numbers; None where numpy has none."""
    tensorrt: str | None = None
    """The member of `trt.DataType`, for what keys and values may be."""
    triton: str | None = None
    """What Triton calls a pointer to such numbers, for what keys and values may be."""

    @property
    def bits(self) -> str:
        """The numpy type of arrays on the host: `array`, or unsigned integers that hold the bits."""
        return self.array or f"<u{self.bytes}"


_RECORDS = (
    DtypeRecord("bool", 1, "BOOL", "BOOL", "?"),
    DtypeRecord("uint8", 1, "U8", "UINT8", "u1"),
    DtypeRecord("int8", 1, "I8", "INT8", "i1"),
    DtypeRecord("float8_e4m3fn", 1, "F8_E4M3", "FLOAT8E4M3FN"),
    DtypeRecord("float8_e5m2", 1, "F8_E5M2", "FLOAT8E5M2"),
    DtypeRecord("float8_e8m0fnu", 1, "F8_E8M0", "FLOAT8E8M0"),
    DtypeRecord("uint16", 2, "U16", "UINT16", "<u2"),
    DtypeRecord("int16", 2, "I16", "INT16", "<i2"),
    DtypeRecord("float16", 2, "F16", "FLOAT16", "<f2", "HALF", "*fp16"),
    DtypeRecord("bfloat16", 2, "BF16", "BFLOAT16", None, "BF16", "*bf16"),
    DtypeRecord("uint32", 4, "U32", "UINT32", "<u4"),
    DtypeRecord("int32", 4, "I32", "INT32", "<i4"),
    DtypeRecord("float32", 4, "F32", "FLOAT", "<f4", "FLOAT", "*fp32"),
    DtypeRecord("uint64", 8, "U64", "UINT64", "<u8"),
    DtypeRecord("int64", 8, "I64", "INT64", "<i8"),
    DtypeRecord("float64", 8, "F64", "DOUBLE", "<f8"),
    DtypeRecord("complex64", 8, "C64", "COMPLEX64"),
)

DTYPES = {record.name: record for record in _RECORDS}
"""By name."""

STORED_AS = {record.code: record for record in _RECORDS}
"""By code in a safetensors file."""
