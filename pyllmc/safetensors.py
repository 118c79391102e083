"""The safetensors format: a JSON header that names each tensor's dtype, shape and place, then their bytes.

    8 bytes    length of the header, little-endian
    header     {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {...}}
    data       which the tensors cover without overlaps or holes; their places count from its beginning

The safetensors package does this too, but gives NumPy no bfloat16. Here every number is held against the size of the
file before anything is allocated from it. Called by huggingface.py; calls files.py.
"""

from __future__ import annotations

import json
import math
import struct
from typing import BinaryIO, NamedTuple

from .files import MAX_JSON_BYTES, file_size, parse_json, read_exact

LENGTH = struct.Struct("<Q")

# No tensor of a model has more; nor does anything of 2^63 bytes fit anywhere.
MAX_DIMENSIONS = 8
MAX_NUMBER = 2**63

# dtype -> bytes per number
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

METADATA = "__metadata__"
ENTRY = {"dtype", "shape", "data_offsets"}


class Stored(NamedTuple):
    """A tensor in a file; `start` is its first byte, counted from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_header(file: BinaryIO) -> dict[str, Stored]:
    """name -> tensor of a file that has just been opened; ValueError, which names file and tensor, if it is wrong."""
    size = file_size(file)
    (length,) = LENGTH.unpack(read_exact(file, LENGTH.size, "the length of its header"))
    data_start = LENGTH.size + length
    if data_start > size or length > MAX_JSON_BYTES:
        raise ValueError(
            f"{file.name}: a header of {length} bytes in a file of {size}, expected at most {MAX_JSON_BYTES}; it is "
            "truncated, or no safetensors file"
        )
    content = parse_json(read_exact(file, length, "its header"), f"{file.name}: the header")
    metadata = content.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{file.name}: {METADATA} must hold strings, got {metadata!r:.80}")
    tensors = {
        name: _checked(f"{file.name}: tensor {name!r:.80}", entry, data_start, size) for name, entry in content.items()
    }
    end = data_start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if stored.start != end:
            problem = "overlaps the one before it" if stored.start < end else "has a hole before it"
            raise ValueError(f"{file.name}: tensor {name!r:.80} {problem}: starts at byte {stored.start}, not {end}")
        end += stored.num_bytes
    if end != size:
        raise ValueError(f"{file.name}: the last tensor ends at byte {end}, the file at {size}; it is damaged")
    return tensors


def _checked(where: str, entry, data_start: int, size: int) -> Stored:
    """One tensor of the header, whose bytes are inside the file."""
    if not isinstance(entry, dict) or entry.keys() != ENTRY:
        raise ValueError(f"{where}: expected dtype, shape and data_offsets, got {entry!r:.80}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"{where}: dtype is {dtype!r:.40}, known are {', '.join(DTYPE_BYTES)}")
    if not _are_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{where}: shape must be up to {MAX_DIMENSIONS} whole numbers, got {shape!r:.80}")
    if not _are_numbers(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - data_start:
        raise ValueError(
            f"{where}: data_offsets are {offsets!r:.80}, expected two in order in {size - data_start} bytes of data; "
            "the file is truncated or damaged"
        )
    stored = Stored(dtype, tuple(shape), data_start + offsets[0])
    if stored.num_bytes != offsets[1] - offsets[0]:
        raise ValueError(
            f"{where}: {offsets[1] - offsets[0]} bytes, expected {stored.num_bytes} for {dtype} {shape}; it is damaged"
        )
    return stored


def _are_numbers(values) -> bool:
    # A bool is an int, but not in a file.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < MAX_NUMBER for value in values)


def header_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """What stands before the data of name -> (dtype, shape), whose bytes follow one another in this order.

    Spaces at its end make the data begin at a multiple of 8 bytes, for those who map the file into memory.
    """
    content, end = {METADATA: metadata}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    header = json.dumps(content, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return LENGTH.pack(len(header)) + header
