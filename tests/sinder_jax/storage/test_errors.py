import errno
import os

import orbax.checkpoint as ocp
import pytest

import convert
from sinder_jax import checkpoint, planted
from sinder_jax.storage import errors
from sinder_jax.storage.errors import DamagedError, reason_of


def test_a_system_error_is_quoted_by_its_text():
    full = os.strerror(errno.ENOSPC)
    assert reason_of(OSError(errno.ENOSPC, full, "/some/file")) == full
    wrapped = ValueError(f"RESOURCE: [os_error_code='{errno.ENOSPC}'] writing\nmore")
    assert reason_of(wrapped) == full


def test_a_long_error_is_quoted_by_its_first_line():
    assert reason_of(KeyError("one\ntwo")) == "KeyError: 'one\\ntwo'"
    assert reason_of(ValueError("one\ntwo")) == "ValueError: one"
    assert reason_of(ValueError("x" * 500)) == f"ValueError: {'x' * 199}…"
    assert reason_of(TimeoutError()) == "TimeoutError: no reason given"


# --- Damage, and what is not ----------------------------------------------------------


def system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


FAULTS = [
    system_error(errno.EIO),
    system_error(errno.EACCES),
    system_error(errno.EMFILE),
    # As TensorStore tells it.
    ValueError(f"INTERNAL: reading failed [os_error_code='{errno.EIO}']"),
]
OTHERS = [
    MemoryError("no 4 GiB"),
    ImportError("No module named 'x'"),
    RuntimeError("Unable to initialize backend 'cuda'"),
    AssertionError("a mistake of ours"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model"
    made = planted.planted_model(0)
    checkpoint.save(path, made.config, made.params)
    return path


def raised(monkeypatch, path, error, *, calls: int) -> BaseException:
    """What opening raises if Orbax fails with this error at a certain call."""
    restore, count = ocp.Checkpointer.restore, 0

    def fails(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            raise error
        return restore(self, *args, **kwargs)

    monkeypatch.setattr(ocp.Checkpointer, "restore", fails)
    with pytest.raises(type(error) if error in OTHERS else Exception) as caught:
        list(convert.open_model(path).leaves())
    return caught.value


# The first call reads the metadata, the second an array.
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("error", FAULTS, ids=str)
def test_a_fault_of_the_disk_is_told_as_such(error, calls, whole, monkeypatch):
    told = raised(monkeypatch, whole, error, calls=calls)
    assert isinstance(told, OSError)
    assert str(told) == f"{whole} cannot be read: {reason_of(error)}"


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_an_error_of_another_kind_is_not_called_damage(
    error, calls, whole, monkeypatch
):
    assert raised(monkeypatch, whole, error, calls=calls) is error


@pytest.mark.parametrize(
    "error", [ValueError("chunk"), FileNotFoundError(errno.ENOENT, "gone")], ids=str
)
def test_broken_bytes_and_lost_files_are_damage(error, whole, monkeypatch):
    told = raised(monkeypatch, whole, error, calls=2)
    assert isinstance(told, DamagedError)
    with pytest.raises(DamagedError), errors.reading("x", (), DamagedError):
        raise system_error(errno.EINVAL)
