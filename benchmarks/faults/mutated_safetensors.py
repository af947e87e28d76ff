"""Mutated safetensors files: what their header says, and the bytes behind it."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from benchmarks.faults import mutated_weights
from benchmarks.faults.mutated_bytes import ANY, Random
from benchmarks.faults.trial import Trial


def trials(folder: Path, rng: Random) -> Iterator[Trial]:
    """A hub model without a checksum and one of our exports, mutated in turn."""
    originals = mutated_weights.originals(folder, rng, "safetensors")
    load = safetensors.numpy.load_file
    return mutated_weights.trials(originals, rng, MUTATIONS, load)


HUGE = [0, 1, -1, -4, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 10**400]
ODD = [None, True, "", "8", 0.5, 1e300, float("nan"), [], {}, [[1]], "F32\0", "\ud800"]


def _edited(
    data: bytes, change: Callable[[dict[str, Any]], Any], dump: Any = json.dumps
) -> bytes:
    """The file with its header changed in place, or replaced by what `change` gives."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    made = change(header)
    text = made if isinstance(made, bytes) else dump(header).encode()
    return struct.pack("<Q", len(text)) + text + data[end:]


def _tensor(rng: Random, header: dict[str, Any]) -> str:
    return str(rng.choice([key for key in header if key != "__metadata__"]))


def _odd(rng: Random) -> Any:
    values = [*HUGE, *ODD]
    return values[rng.integers(len(values))]


def header_length(rng: Random, data: bytes) -> bytes:
    """A length of the header that is not its own."""
    length = int.from_bytes(data[:8], "little")
    values = [
        0,
        1,
        length - 1,
        length + 1,
        8 * length,
        len(data),
        2**31,
        2**63,
        2**64 - 1,
    ]
    return struct.pack("<Q", values[rng.integers(len(values))]) + data[8:]


def offset(rng: Random, data: bytes) -> bytes:
    """One offset shifted, huge, negative, or no number."""

    def change(header: dict[str, Any]) -> None:
        offsets = header[_tensor(rng, header)]["data_offsets"]
        side = int(rng.integers(2))
        shifted = offsets[side] + int(rng.choice([-4, -1, 1, 4, 256]))
        offsets[side] = shifted if rng.integers(2) else _odd(rng)

    return _edited(data, change)


def offsets_of_another(rng: Random, data: bytes) -> bytes:
    """Two tensors overlap, or have changed places."""

    def change(header: dict[str, Any]) -> None:
        a, b = (header[_tensor(rng, header)] for _ in range(2))
        first, second = a["data_offsets"], b["data_offsets"]
        a["data_offsets"] = second
        if rng.integers(2):
            b["data_offsets"] = first

    return _edited(data, change)


def all_offsets_shifted(rng: Random, data: bytes) -> bytes:
    """A gap before the first tensor."""
    step = int(rng.choice([-8, 4, 8, 2**40]))

    def change(header: dict[str, Any]) -> None:
        for key, entry in header.items():
            if key != "__metadata__":
                entry["data_offsets"] = [x + step for x in entry["data_offsets"]]

    return _edited(data, change)


def number_format(rng: Random, data: bytes) -> bytes:
    """Another number format, of the same size or not."""
    known = ["F16", "BF16", "F64", "I32", "U32", "I64", "F8_E4M3", "BOOL", "C64", "f32"]

    def change(header: dict[str, Any]) -> None:
        odd = known[rng.integers(len(known))] if rng.integers(3) else _odd(rng)
        header[_tensor(rng, header)]["dtype"] = odd

    return _edited(data, change)


def shape(rng: Random, data: bytes) -> bytes:
    """Sides swapped, added, huge, negative, or no numbers."""

    def change(header: dict[str, Any]) -> None:
        entry = header[_tensor(rng, header)]
        sides = entry["shape"]
        place = int(rng.integers(len(sides)))
        odd = [*sides[:place], _odd(rng), *sides[place + 1 :]]
        made = [sides[::-1], [1, *sides], [*sides, 1], [0, *sides], odd, odd, _odd(rng)]
        entry["shape"] = made[rng.integers(len(made))]

    return _edited(data, change)


def zero_size(rng: Random, data: bytes) -> bytes:
    """A further tensor without numbers, somewhere in the data."""

    def change(header: dict[str, Any]) -> None:
        place = header[_tensor(rng, header)]["data_offsets"][int(rng.integers(2))]
        name = str(rng.choice(["head.weight", "extra", "blocks.0.norm1.extra"]))
        sizes = [[0], [0, 2**62], [2**62, 0, 2**62], [3, 0]][rng.integers(4)]
        entry = {"dtype": "F32", "shape": sizes, "data_offsets": [place, place]}
        header[name] = entry

    return _edited(data, change)


def name(rng: Random, data: bytes) -> bytes:
    """A tensor under another name."""
    names = [
        "",
        "..",
        "/etc/passwd",
        "a" * 10**5,
        "\0",
        "ключ",
        "\ud800",
        "blocks.x.y",
        "blocks.9999999999.norm1.weight",
        "module.",
        "teacher.backbone.",
        "__x__",
    ]

    def change(header: dict[str, Any]) -> None:
        old = _tensor(rng, header)
        new = names[rng.integers(len(names))]
        header[new + old if rng.integers(2) else new] = header.pop(old)

    return _edited(data, change)


def twice(rng: Random, data: bytes) -> bytes:
    """A name that occurs twice, with the same entry or another one."""

    def change(header: dict[str, Any]) -> bytes:
        a, b = _tensor(rng, header), _tensor(rng, header)
        more = f"{json.dumps(a)}: {json.dumps(header[b])}"
        return f"{json.dumps(header)[:-1]}, {more}}}".encode()

    return _edited(data, change)


def entry(rng: Random, data: bytes) -> bytes:
    """A whole entry, or one of its fields, missing or of another type."""

    def change(header: dict[str, Any]) -> None:
        key = _tensor(rng, header)
        field = str(rng.choice(["dtype", "shape", "data_offsets", "other"]))
        action = int(rng.integers(4))
        if action == 0:
            header[key] = _odd(rng)
        elif action == 1:
            header.pop(key)
        elif action == 2:
            header[key].pop(field, None)
        else:
            header[key][field] = _odd(rng)

    return _edited(data, change)


def metadata(rng: Random, data: bytes) -> bytes:
    """Metadata that is no text by name, or our own entry damaged."""
    ours = [
        "",
        "{",
        "[]",
        "null",
        "[" * 10**5,
        '{"config": {}}',
        "9" * 5000,
        '"\\ud800"',
    ]

    def change(header: dict[str, Any]) -> None:
        if rng.integers(2):
            header["__metadata__"] = _odd(rng)
        else:
            text = ours[rng.integers(len(ours))]
            header.setdefault("__metadata__", {})["sinder_jax"] = text

    return _edited(data, change)


def our_description(rng: Random, data: bytes) -> bytes:
    """A value of our own description replaced."""

    def change(header: dict[str, Any]) -> None:
        stated = json.loads(header.get("__metadata__", {}).get("sinder_jax", "{}"))
        stated = stated or {"config": {}, "provenance": {}, "digest": ""}
        part = stated[str(rng.choice(["config", "provenance"]))]
        keys = [*part, "steps", "unknown"]
        part[keys[rng.integers(len(keys))]] = _odd(rng)
        header["__metadata__"] = {"sinder_jax": json.dumps(stated)}

    return _edited(data, change)


def json_text(rng: Random, data: bytes) -> bytes:
    """A header that is deep, not UTF-8, padded, or not quite JSON."""
    action = int(rng.integers(7))

    def change(header: dict[str, Any]) -> bytes:
        text = json.dumps(header).encode()
        deep = int(rng.choice([50, 127, 128, 1000, 10**5]))
        blank = [b" ", b"\n", b"\t", b"\0", b"\r\n "][rng.integers(5)] * 64
        place = int(rng.integers(len(text)))
        return [
            text[:-1] + b', "x": ' + b"[" * deep + b"]" * deep + b"}",
            text[:-1] + b', "x": ' + b'{"a":' * deep + b"1" + b"}" * deep + b"}",
            text[:place] + b"\xff\xfe" + text[place:],
            blank + text,
            text + blank,
            text[:-1] + b', "__metadata__": {"a": ' + b"9" * 10**5 + b"}}",
            b"\xef\xbb\xbf" + text,
        ][action]

    return _edited(data, change)


def not_finite(rng: Random, data: bytes) -> bytes:
    """NaN, infinity, the smallest and the largest number in place of weights."""
    end = 8 + int.from_bytes(data[:8], "little")
    place = end + 4 * int(rng.integers((len(data) - end) // 4))
    values = [np.nan, np.inf, -np.inf, 1e-45, 3.4e38, -0.0]
    number = np.float32(values[rng.integers(len(values))]).tobytes()
    return data[:place] + number + data[place + 4 :]


MUTATIONS = [
    *ANY, header_length, offset, offset, offsets_of_another, all_offsets_shifted,
    number_format, shape, shape, zero_size, name, twice, entry, entry, metadata,
    our_description, json_text, json_text, not_finite,
]  # fmt: skip
