"""Numeric arrays of MATLAB files of versions 5 to 7, compressed or not.

    bytes of a file --variables--> (name, array), (name, array), ...

SciPy's `loadmat` reads more kinds of files, but ends the process by a segmentation
fault where the type of an element is damaged (seen in SciPy 1.17), which no program can
answer. Format: MathWorks, "MAT-File Format", level 5.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

HEADER = 128  # bytes: a text, then version and byte order
HDF5 = 2  # the version that begins files of version 7.3
MOST_BYTES = 1 << 28  # of a variable; a tile takes 160,000
MATRIX, COMPRESSED = 14, 15  # types of elements
STORED = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
CLASSES = {
    6: "f8",
    7: "f4",
    8: "i1",
    9: "u1",
    10: "i2",
    11: "u2",
    12: "i4",
    13: "u4",
    14: "i8",
    15: "u8",
}
HEAD = (6, 5, 1)  # types of the class, size and name of a variable
COMPLEX = 0x0800  # flag of a variable


class Variable(NamedTuple):
    """A variable of a file.

    Attributes:
      name: it is called so in MATLAB.
      array: in MATLAB's order of axes; None for text, cells, structures, sparse or
        complex numbers.
    """

    name: str
    array: np.ndarray | None


def variables(content: bytes) -> Iterator[Variable]:
    """Yields the variables of a file.

    Raises:
      ValueError: the file is damaged or of another format; says how.
    """
    order = {b"IM": "<", b"MI": ">"}.get(content[HEADER - 2 : HEADER])
    if order is None:
        raise ValueError("not a MATLAB file of version 5 to 7")
    (version,) = struct.unpack_from(f"{order}H", content, HEADER - 4)
    if version >> 8 == HDF5:
        raise ValueError(
            "a MATLAB file of version 7.3; save it as version 7, by MATLAB's -v7 or "
            "scipy.io.savemat"
        )
    place = HEADER
    while place < len(content):
        kind, data, place = _element(content, place, order)
        if kind == COMPRESSED:
            kind, data, _ = _element(_unpacked(data), 0, order)
        if kind != MATRIX:
            raise ValueError(f"damaged: a variable of type {kind}")
        yield _variable(data, order)


def _element(content: bytes, place: int, order: str) -> tuple[int, bytes, int]:
    """Type and bytes of an element, and where the next one begins."""
    if place + 8 > len(content):
        raise ValueError("damaged: it ends too early")
    kind, size = struct.unpack_from(f"{order}II", content, place)
    start = place + 8
    if kind >> 16:  # up to four bytes lie in the second half of the tag
        kind, size, start = kind & 0xFFFF, kind >> 16, place + 4
        after = place + 8
    else:  # only what is compressed is not filled up to eight bytes
        after = start + size + (-size % 8 if kind != COMPRESSED else 0)
    if start + size > min(len(content), after):
        raise ValueError("damaged: it ends too early")
    return kind, content[start : start + size], after


def _unpacked(data: bytes) -> bytes:
    unpacking = zlib.decompressobj()
    try:
        found = unpacking.decompress(data, MOST_BYTES)
    except zlib.error as error:
        raise ValueError(f"damaged: {error}") from None
    if not unpacking.eof:
        raise ValueError(f"damaged, or a variable of more than {MOST_BYTES:,} bytes")
    return found


def _variable(data: bytes, order: str) -> Variable:
    place, parts = 0, []
    for _ in range(3):
        kind, part, place = _element(data, place, order)
        parts.append((kind, part))
    (flags_kind, flags), (sides_kind, sides), (name_kind, name) = parts
    whole = len(flags) == 8 and len(sides) % 4 == 0
    if not whole or (flags_kind, sides_kind, name_kind) != HEAD:
        raise ValueError("damaged: a variable without class, size or name")
    text = name.decode("latin-1")
    (bits,) = struct.unpack_from(f"{order}I", flags)
    if bits & 0xFF not in CLASSES or bits & COMPLEX:
        return Variable(text, None)
    kind, numbers, _ = _element(data, place, order)
    if kind not in STORED or len(numbers) % np.dtype(STORED[kind]).itemsize:
        raise ValueError(f"damaged: {text} has numbers of type {kind}")
    stored = np.frombuffer(numbers, f"{order}{STORED[kind]}")
    shape = [int(n) for n in np.frombuffer(sides, f"{order}i4")]
    if min(shape, default=-1) < 0 or math.prod(shape) != stored.size:
        raise ValueError(f"damaged: {text} has {stored.size} numbers for {shape}")
    array = stored.astype(CLASSES[bits & 0xFF])  # MATLAB stores them in fewer bits
    return Variable(text, array.reshape(shape, order="F"))
