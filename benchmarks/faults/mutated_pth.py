"""Mutated files of torch.save: the archive, the pickle in it, the tensors it names."""

import collections
import io
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.faults import mutated_weights
from benchmarks.faults.mutated_bytes import ANY, Random, bit_flip
from benchmarks.faults.trial import Trial


def trials(folder: Path, rng: Random) -> Iterator[Trial]:
    """A hub model, one of our exports, and PyTorch's format before 1.6, mutated."""
    originals = mutated_weights.originals(folder, rng, "pth")
    legacy = folder / "legacy.pth"
    legacy.write_bytes(
        _saved(_state(originals[0]), _use_new_zipfile_serialization=False)
    )
    return mutated_weights.trials([*originals, legacy], rng, MUTATIONS, _load)


def _load(path: Path) -> dict[str, np.ndarray]:
    state = _state(path)
    return {key: tensor.detach().float().numpy() for key, tensor in state.items()}


def _state(file: Any) -> dict[str, Any]:
    loaded = torch.load(file, weights_only=True)
    for name in ("teacher", "model", "state_dict"):
        loaded = loaded.get(name, loaded)
    return loaded


def _entries(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return made.getvalue()


def _saved(contents: Any, **options: Any) -> bytes:
    made = io.BytesIO()
    torch.save(contents, made, **options)
    return made.getvalue()


def _in_pickle(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The file with its pickle changed; a legacy file holds several before its data."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        entries = _entries(data)
        key = next(name for name in entries if name.endswith("data.pkl"))
        return _zipped(entries | {key: change(entries[key])})
    stream = io.BytesIO(data)
    for _ in range(3):  # magic number, protocol, system
        collections.deque(pickletools.genops(stream), maxlen=0)
    start = stream.tell()
    collections.deque(pickletools.genops(stream), maxlen=0)
    return data[:start] + change(data[start : stream.tell()]) + data[stream.tell() :]


def _operations(pickled: bytes) -> list[tuple[str, Any, bytes]]:
    """Name, argument and bytes of every operation."""
    found = [
        (code.name, argument, at) for code, argument, at in pickletools.genops(pickled)
    ]
    ends = [at for _, _, at in found[1:]] + [len(pickled)]
    return [
        (n, a, pickled[at:end]) for (n, a, at), end in zip(found, ends, strict=True)
    ]


def _some(rng: Random, operations: list[tuple[str, Any, bytes]], names: str) -> int:
    """Position of an operation of these kinds."""
    at = [i for i, (name, _, _) in enumerate(operations) if name in names.split()]
    return int(rng.choice(at))


def pickle_bytes(rng: Random, data: bytes) -> bytes:
    """Bytes of the pickle replaced, removed or added."""

    def change(pickled: bytes) -> bytes:
        place, noise = (
            int(rng.integers(len(pickled))),
            rng.bytes(int(rng.integers(1, 9))),
        )
        rest = pickled[place + int(rng.choice([0, 1, len(noise)])) :]
        return pickled[:place] + noise + rest

    return _in_pickle(data, change)


def pickle_operations(rng: Random, data: bytes) -> bytes:
    """Operations of the pickle removed, repeated or exchanged."""

    def change(pickled: bytes) -> bytes:
        parts = [part for _, _, part in _operations(pickled)]
        for _ in range(rng.integers(1, 4)):
            i, j = (int(x) for x in rng.integers(len(parts), size=2))
            parts[i : i + 1] = [[], [parts[i]] * 2, [parts[j]]][rng.integers(3)]
        return b"".join(parts)

    return _in_pickle(data, change)


def pickle_number(rng: Random, data: bytes) -> bytes:
    """A size, stride, offset or storage length that is huge, negative or no number."""
    values = [
        b"K\0", b"K\1", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"N", b"]", b"\x88",
        b"\x8a\x08" + (2**62).to_bytes(8, "little"), b"\x8a\x09" + bytes(8) + b"\1",
        b"G\x7f\xf0" + bytes(6), b"X\2\0\0\0ab",
    ]  # fmt: skip

    def change(pickled: bytes) -> bytes:
        operations = _operations(pickled)
        parts = [part for _, _, part in operations]
        for _ in range(rng.integers(1, 3)):
            place = _some(rng, operations, "BININT BININT1 BININT2")
            parts[place] = values[rng.integers(len(values))]
        return b"".join(parts)

    return _in_pickle(data, change)


def pickle_name(rng: Random, data: bytes) -> bytes:
    """A class, tensor, storage or device by another name."""
    texts = [
        "", "..", "../../x", "cuda:0", "meta", "cpu", "0", "99999", "x" * 10**4, "\0",
        "module.norm.weight", "blocks.10.norm1.bias", "storage",
    ]  # fmt: skip
    classes = [
        "torch HalfStorage", "torch FloatStorage", "torch QInt8Storage", "torch Size",
        "torch device", "torch load", "torch float16", "torch Tensor", "os system",
        "torch._utils _rebuild_qtensor", "torch._utils _rebuild_sparse_tensor",
        "torch._utils _rebuild_parameter", "torch.nn.parameter Parameter",
        "torch.storage UntypedStorage", "torch.serialization _get_layout", "a.b c.d",
        "builtins eval", "collections OrderedDict", "numpy ndarray", "x",
    ]  # fmt: skip

    def change(pickled: bytes) -> bytes:
        operations = _operations(pickled)
        parts = [part for _, _, part in operations]
        if rng.integers(2):
            place = _some(rng, operations, "GLOBAL")
            module, _, attribute = classes[rng.integers(len(classes))].partition(" ")
            parts[place] = f"c{module}\n{attribute}\n".encode()
        else:
            place = _some(rng, operations, "BINUNICODE")
            text = texts[rng.integers(len(texts))].encode()
            parts[place] = b"X" + struct.pack("<I", len(text)) + text
        return b"".join(parts)

    return _in_pickle(data, change)


def pickle_bomb(rng: Random, data: bytes) -> bytes:
    """Recursion, a memo or a list without end, sizes that ask for all memory."""
    mark = [b"(", b"]", b"}"][rng.integers(3)]
    deep = int(rng.choice([100, 3000, 10**5, 2 * 10**6]))
    large = struct.pack("<I", 2**31 - 1), struct.pack("<Q", 2**40)
    bombs = [
        b"\x80\2" + mark * deep + b".",
        b"\x80\2" + b"]" * deep + b"a" * (deep - 1) + b".",  # a list in a list in ...
        b"\x80\2" + b")" + b"\x85" * deep + b".",  # a tuple in a tuple in ...
        b"\x80\2]q\0h\0a" + b"h\0a" * deep + b".",  # a list that holds itself
        b"\x80\2]q\0" + b"(h\0h\0t\x94" * min(deep, 10**4) + b".",
        b"\x80\2Nr" + large[0] + b".",
        b"\x80\2j" + large[0] + b".",
        b"\x80\5\x95" + large[1] + b"N.",
        b"\x80\5\x96" + large[1] + b"N.",
        b"\x80\2X" + large[0] + b"abc.",
        b"\x80\2\x8b" + large[0] + b"\1.",
        b"\x80\2ctorch\nSize\n((" + b"K\1" * min(deep, 10**4) + b"ttR.",
        b"\x80\2cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\1\x85R.",
        b"\x80\2ccollections\nOrderedDict\n)R" + b"2" * min(deep, 10**4) + b".",
    ]
    bomb = bombs[rng.integers(len(bombs))]
    return bomb if rng.integers(4) == 0 else _in_pickle(data, lambda _: bomb)


def archive(rng: Random, data: bytes) -> bytes:
    """An archive with entries missing, too many, renamed, cut, or compressed."""
    entries = (
        _entries(data) if data[:2] == b"PK" else _entries(_saved({"x": torch.ones(3)}))
    )
    names = [name for name in entries if "/data/" in name]
    key, other = (str(x) for x in rng.choice(names, 2))
    top, content = key.partition("/")[0], entries[key]
    made = [
        {name: each for name, each in entries.items() if name != key},
        entries | {key: content[: len(content) // 2]},
        entries | {key: content * 2},
        entries | {key: b""},
        entries | {key: entries[other]},
        entries | {f"{top}/byteorder": b"big"},
        entries | {f"{top}/byteorder": b"middle"},
        entries | {f"{top}/version": b"999\n"},
        entries | {f"{top}/version": b"x"},
        entries | {f"{top}/extra/x": bytes(10**5)},
        entries | {f"{top}/extra/sinder_jax": b"[" * 10**5},
        entries | {"other/data.pkl": b"."},
        entries | {"../../evil": b"x", "/etc/evil": b"x"},
        entries | {f"{top}/{i}": b"" for i in range(25_000)},
        {f"x/{name}": each for name, each in entries.items()},
        {name.partition("/")[2]: each for name, each in entries.items()},
        {},
    ]
    chosen = made[rng.integers(len(made))]
    kinds = [zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]
    return _zipped(chosen, kinds[rng.integers(len(kinds))])


def directory(rng: Random, data: bytes) -> bytes:
    """A field of the archive's directory or of its end replaced."""
    if data[:2] != b"PK":
        return bit_flip(rng, data)
    starts = [i for i in range(len(data)) if data[i : i + 4] in (b"PK\1\2", b"PK\3\4")]
    ends = [
        i for i in range(len(data) - 3) if data[i : i + 4] in (b"PK\5\6", b"PK\6\6")
    ]
    base = int(rng.choice(ends if rng.integers(2) else starts))
    size = int(rng.choice([2, 4, 8]))
    place = base + int(rng.integers(4, 46))
    values = [0, 1, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
    value = values[rng.integers(len(values))] % 2 ** (8 * size)
    return data[:place] + value.to_bytes(size, "little") + data[place + size :]


def view(rng: Random, data: bytes) -> bytes:
    """The same weights as views, parameters or another format; or one that is none."""
    state = _state(io.BytesIO(data))
    key = str(rng.choice(list(state)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch deprecates is still in files
        made = _instead(rng, state[key])
        changed = state | {key: made[rng.integers(len(made))]}
        outer: list[Any] = [
            changed,
            collections.OrderedDict(changed),
            {"teacher": changed, "iteration": 3},
            {"model": {f"module.{name}": each for name, each in changed.items()}},
            {"state_dict": changed, "optimizer": {"state": {}, "lr": 0.1}},
            list(changed.values()),
            changed | {0: state[key]},
            changed | {b"x": state[key]},
        ]
        chosen = outer[rng.integers(len(outer))]
        return _saved(chosen, _use_new_zipfile_serialization=bool(rng.integers(3)))


def _instead(rng: Random, tensor: torch.Tensor) -> list[Any]:
    """What may stand in place of a tensor; the first three mean the same."""
    floats = [torch.float16, torch.bfloat16, torch.float64]
    others = [torch.int64, torch.uint8, torch.bool, torch.complex64]
    return [
        torch.nn.Parameter(tensor),
        tensor.t().contiguous().t() if tensor.dim() == 2 else tensor,
        torch.cat([tensor, tensor])[: len(tensor)],
        tensor.expand(2**20, *tensor.shape),
        torch.ones(1).expand(tensor.shape),
        tensor.to(floats[rng.integers(3)]),
        tensor.to(others[rng.integers(4)]),
        tensor.to("meta"),
        tensor.to_sparse(),
        torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        tensor[:0],
        tensor * torch.nan,
        tensor.double() * 1e300,
        tensor.numpy(),
        {"nested": tensor},
        None,
        [tensor],
    ]


MUTATIONS = [
    *ANY, pickle_bytes, pickle_bytes, pickle_operations, pickle_operations,
    pickle_number, pickle_number, pickle_name, pickle_name, pickle_bomb, archive,
    archive, directory, directory, view, view,
]  # fmt: skip
