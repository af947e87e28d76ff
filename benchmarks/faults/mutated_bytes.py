"""Mutations of the bytes of any file, for `mutations`.

rng, bytes of a file --a function of ANY--> other bytes
"""

import numpy as np

Random = np.random.Generator


def bit_flip(rng: Random, data: bytes) -> bytes:
    """Flips 1 to 3 bits, half of the time near one of the ends."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        changed[place_in(rng, len(data))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def place_in(rng: Random, size: int) -> int:
    """A position, often near one of the ends."""
    near = int(rng.integers(min(size, 4096)))
    return int(rng.choice([near, size - 1 - near, rng.integers(size), near // 8]))


def truncated(rng: Random, data: bytes) -> bytes:
    """The beginning only."""
    return data[: place_in(rng, len(data))]


def appended(rng: Random, data: bytes) -> bytes:
    """Zeros, noise or a second copy at the end."""
    return data + [bytes(rng.integers(1, 5000)), rng.bytes(99), data][rng.integers(3)]


def inserted(rng: Random, data: bytes) -> bytes:
    """Bytes too many somewhere."""
    place = place_in(rng, len(data))
    return data[:place] + rng.bytes(int(rng.integers(1, 100))) + data[place:]


def deleted(rng: Random, data: bytes) -> bytes:
    """Bytes missing somewhere."""
    place = place_in(rng, len(data))
    return data[:place] + data[place + int(rng.integers(1, 100)) :]


def hole(rng: Random, data: bytes) -> bytes:
    """A block of the disk lost: zeros, or noise."""
    start = place_in(rng, len(data))
    size = min(int(rng.choice([16, 512, 4096, 65536])), len(data) - start)
    lost = bytes(size) if rng.integers(2) else rng.bytes(size)
    return data[:start] + lost + data[start + size :]


def other_content(rng: Random, data: bytes) -> bytes:
    """No weights at all."""
    return OTHER[rng.integers(len(OTHER))]


OTHER = [
    b"",
    b"\0",
    bytes(5000),
    b"{}",
    b"[" * 3000,
    b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
    b'{"error": "Repository not found"}',
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 346378731\n",
    b"PK\5\6" + bytes(18),
    b"\x80\x02.",
    b"\x80\x02}q\0.",
    b"\x1f\x8b\x08" + bytes(100),
    b"\x93NUMPY\x01\0v\0" + bytes(200),
    b"\x89HDF\r\n\x1a\n" + bytes(200),
]
ANY = [bit_flip, bit_flip, truncated, appended, inserted, deleted, hole, other_content]
