"""How Orbax is set up to write and read one item: a tree of arrays, or JSON.

    tree, JSON --arrays_args, checkpointer--> DIR/arrays_N, DIR/metadata --> the same

Every process writes and reads alone, without a barrier. Errors come back as exceptions,
nothing is logged, and no background thread outlives a failed save.
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

# Measured on 480 MB: chunks of this size save twice as fast and with two thirds of the
# memory of one chunk per array, and files of their own (no OCDBT) four times as fast.
CHUNK_BYTES = 32 * 2**20
JOIN_TIMEOUT = 60  # seconds: a disk that hangs must not hide the error


def alone() -> ocp.options.MultiprocessingOptions:
    """Options for a process that waits for no other process and may write."""
    here = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}
    )


def check_may_write() -> None:
    """Raises RuntimeError on any process but 0: Orbax would leave out its arrays."""
    if jax.process_index():
        raise RuntimeError(
            f"process {jax.process_index()} must leave saving to process 0"
        )


def checkpointer(handler: Any) -> ocp.Checkpointer:
    """Writes and reads one item by a handler class, such as `arrays_handler`."""
    return ocp.Checkpointer(
        handler(multiprocessing_options=alone()), multiprocessing_options=alone()
    )


class _OneByOne(ocp.type_handlers.NumpyHandler):
    async def serialize(self, values, infos, args=None):
        """Writes each array in a task of its own, so that failures stay separate.

        On a full disk all fail, and those of a shared task print tracebacks.
        """
        args = args or [ocp.SaveArgs()] * len(values)
        tasks = []
        for value, info, arg in zip(values, infos, args, strict=True):
            tasks += await super().serialize([value], [info], [arg])
        return tasks


def arrays_handler(**options: Any) -> ocp.PyTreeCheckpointHandler:
    """Writes and reads a tree of arrays, which must not change while it is written."""
    numpy = _OneByOne(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, numpy),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # without it Orbax warns
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_compression=False,  # it makes weights 8 % smaller, and writing half as fast
        type_handler_registry=registry,
        **options,
    )


def arrays_args(tree: Mapping[str, Any]) -> ocp.args.PyTreeSave:
    """A nested tree of arrays, as `arrays_handler` is to write it."""
    chunks = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
    return ocp.args.PyTreeSave(tree, save_args=jax.tree.map(lambda _: chunks, tree))


@contextmanager
def quiet() -> Iterator[None]:
    """Silences Orbax's logging: its errors are raised, its warnings do not apply."""

    def is_kept(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    log = logging.getLogger("absl")
    log.addFilter(is_kept)
    try:
        yield
    finally:
        log.removeFilter(is_kept)


def wait_for_writes() -> None:
    """Waits until Orbax's background threads have ended.

    Orbax reports the first array that fails while other threads still write theirs, so
    files that are removed at once appear again. And a new CheckpointManager removes
    unfinished checkpoints in the background. Orbax gives access to neither.
    """
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            with suppress(Exception):  # reported already
                thread.join(JOIN_TIMEOUT)
