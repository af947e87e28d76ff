import io

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from samples import error_of
from sinder_jax.data import matlab

ARRAYS = {
    "img": np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4),
    "gt": np.array([[0, -5, 2**31 - 1]], np.int32),
    "one": np.array([[7]], np.uint16),  # in the tag itself
    "a_long_name_of_a_variable": np.array([[0.5], [np.inf]]),
    "single": np.ones((2, 2), np.float32),
    "big": np.array([[2**63]], np.uint64),
    "empty": np.zeros((0, 3)),
}


def saved(variables, **options):
    file = io.BytesIO()
    savemat(file, variables, **options)
    return file.getvalue()


def read(content):
    return {each.name: each.array for each in matlab.variables(content)}


@pytest.mark.parametrize("do_compression", [False, True])
def test_arrays_equal_scipys(do_compression):
    content = saved(ARRAYS, do_compression=do_compression)
    found, wanted = read(content), loadmat(io.BytesIO(content))
    assert list(found) == list(ARRAYS)
    for name, array in found.items():
        assert np.array_equal(array, wanted[name]), name
        assert array.dtype == wanted[name].dtype and array.shape == wanted[name].shape


def test_what_is_not_a_numeric_array_has_a_name_only():
    other = {"text": "abc", "struct": {"a": 1}, "cell": np.array([1, "a"], object)}
    found = read(saved({**other, "complex": np.ones(2) * 1j, "gt": np.ones((1, 2))}))
    assert [name for name, array in found.items() if array is not None] == ["gt"]
    assert set(found) == {*other, "complex", "gt"}


@pytest.mark.parametrize("do_compression", [False, True])
def test_a_damaged_file_is_told_or_read(do_compression):
    """Cut or changed at any byte; SciPy's reader ends the process at some of them."""
    whole = saved({"img": ARRAYS["img"]}, do_compression=do_compression)
    for end in range(1, len(whole)):
        if end != 128:  # a header alone is a file without variables
            error_of(read, whole[:end])
    told = 0
    for place in range(124, len(whole)):
        for value in (0, 1, 0x7F, 0xFF):
            changed = whole[:place] + bytes([value]) + whole[place + 1 :]
            try:
                read(changed)
            except ValueError as error:
                told += 1
                assert "\n" not in str(error)
    assert told > 100


def test_numbers_may_be_stored_in_fewer_bits_and_the_other_byte_order():
    """As MATLAB writes doubles that are small whole numbers; by hand, big-endian."""
    parts = [
        (6, (6).to_bytes(4, "big") + bytes(4)),
        (5, b"".join(n.to_bytes(4, "big") for n in (2, 3))),
        (1, b"gt"),
        (4, b"".join(n.to_bytes(2, "big") for n in (1, 2, 3, 4, 5, 600))),
    ]
    body = b""
    for kind, data in parts:
        head = kind.to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += head + data + bytes(-len(data) % 8)
    head = b"made by hand".ljust(124) + b"\x01\x00MI"
    content = head + (14).to_bytes(4, "big") + len(body).to_bytes(4, "big") + body
    assert np.array_equal(loadmat(io.BytesIO(content))["gt"], read(content)["gt"])
    assert read(content)["gt"].tolist() == [[1, 3, 5], [2, 4, 600]]
    assert read(content)["gt"].dtype == np.float64
