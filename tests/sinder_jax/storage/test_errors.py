import errno
import os

from sinder_jax.storage.errors import reason_of


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
