"""The states of a run, written while it goes on, and found again after a kill.

    state --save--> copy on the host --in the background--> FOLDER/00000120
    FOLDER --load_newest--> the newest that is not damaged

Orbax's CheckpointManager writes them, one after the other, and removes the old. Each is
a directory as of `sinder_jax.store`, so every array is verified when it is read. One
that is not complete has another name on a disk; in a bucket it lacks Orbax's last
object. Neither is taken for a state, and the next start removes it.
"""

import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    EveryNSteps,
    LatestN,
)

from sinder_jax import checkpoint, param_tree
from sinder_jax.storage import array_store, paths
from sinder_jax.storage.paths import AnyPath, StrPath

ARRAYS, METADATA = "arrays_0", "metadata"
DIGITS = 8  # of a directory's name
TIMEOUT = 600  # seconds, after which a save in the background counts as failed


class States:
    """Saves states in the background and loads the newest good one.

    It waits for no other process: of many hosts, only process 0 creates one. The others
    read with `checkpoint.load_newest`. To be closed, or the last state may be lost.

    Args:
      folder: a directory that exists, or gs://bucket/name.
      keep_last: so many of the newest are kept.
      keep_every: those are kept, too, whose number of images is a multiple of this;
        0: none.

    Raises:
      FileNotFoundError: there is no such directory.
      OSError: it cannot be read.
      RuntimeError: on another process than 0, whose arrays Orbax would leave out.
    """

    def __init__(self, folder: StrPath, *, keep_last: int = 2, keep_every: int = 0):
        if keep_last < 1 or keep_every < 0:
            raise ValueError(
                "keep_last must be at least 1 and keep_every at least 0, got "
                f"{keep_last} and {keep_every}."
            )
        if jax.process_index():
            raise RuntimeError(f"process {jax.process_index()} must leave saving to 0.")
        self.folder = paths.located(folder)
        self._check_folder()
        self._saving = 0  # the state under way
        self._exit = ExitStack()
        self._exit.enter_context(array_store.quiet())
        self._options = (keep_last, keep_every)
        with paths.answering(self.folder):
            self._manager = self._open()

    def __enter__(self) -> "States":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def save(
        self,
        num_images: int,
        tree: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to save a state; a state of that number is left as it is.

        The arrays are copied before this returns: they may be changed or donated. A
        save that is still under way is waited for.

        Args:
          num_images: images passed so far, which names the state.
          tree: nested dicts of arrays, of NumPy or JAX; those of several processes must
            be whole in this one.
          metadata: JSON values to be stored beside; this adds `num_images` and the
            `versions` of what wrote it.

        Raises:
          OSError: this one or the one before cannot be written.
          ValueError: an array or the metadata cannot be stored.
        """
        self.wait()
        self._check_folder()
        if num_images in self._manager.all_steps():
            return
        flat = {
            name: np.array(leaf)  # always a copy
            for name, leaf in param_tree.flatten(jax.device_get(dict(tree))).items()
        }
        entries = {}
        for name, array in flat.items():
            array_store.check_storable(name, array)
            entries[name] = array_store.entry(
                array, param_tree.digest_of_array(array), part=0
            )
        added = {"num_images": num_images, "versions": versions()}
        header = array_store.header(entries, {**(metadata or {}), **added})
        items = {
            ARRAYS: array_store.arrays_args(param_tree.unflatten(flat)),
            METADATA: ocp.args.JsonSave(header),
        }
        self._saving = num_images
        with self._telling():
            self._manager.save(num_images, args=ocp.args.Composite(**items), force=True)

    def check(self) -> None:
        """Raises OSError if the state saved last could not be written; never waits."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the state saved last is there, or raises OSError."""
        with self._telling():
            self._manager.wait_until_finished()

    def load_newest(self) -> checkpoint.Newest | None:
        """As `checkpoint.load_newest`, after the save that is under way."""
        self.wait()
        return checkpoint.load_newest(self.folder)

    def set_aside(self, path: AnyPath) -> AnyPath:
        """Renames a damaged state, so that nobody takes it for one; gives its name."""
        aside = path.with_name(f"{path.name}.damaged")
        paths.remove(aside)
        path.rename(aside)
        self._manager.reload()
        return aside

    def close(self) -> None:
        """Waits as `wait`, and ends what runs in the background."""
        with self._exit:
            try:
                self.wait()
            finally:
                self._manager.close()

    def _open(self) -> "_Manager":
        manager = _Manager(
            self.folder, options=_options(*self._options), handler_registry=_handlers()
        )
        array_store.wait_for_writes()  # removes what was left unfinished
        return manager

    def _check_folder(self) -> None:
        """Before Orbax makes a directory anew that somebody removed with all states."""
        if not paths.is_remote(self.folder) and not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is not there (any more).")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tells an error of Orbax or TensorStore in one line."""
        try:
            yield
        except Exception as error:
            with suppress(Exception):  # the error that counts is the first one
                array_store.wait_for_writes()
                failed, self._manager = self._manager, self._open()
                failed.close()
            raise OSError(
                f"{self.folder}: the state after {self._saving} images could not be "
                f"saved ({array_store.reason_of(error)}); those before are untouched."
            ) from None


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: JAX answers that only if all processes ask at the same step."""
        return False


def versions() -> dict[str, str]:
    """Of what writes a state."""
    return {
        "sinder_jax": array_store.tool().removeprefix("sinder_jax").strip()
        or "unknown",
        "jax": jax.__version__,
        "orbax": ocp.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _options(keep_last: int, keep_every: int) -> ocp.CheckpointManagerOptions:
    kept = [LatestN(keep_last)]
    if keep_every:
        kept.append(EveryNSteps(keep_every))
    return ocp.CheckpointManagerOptions(
        create=False,  # with `active_processes` Orbax cannot
        save_root_metadata=False,
        cleanup_tmp_directories=True,
        lightweight_initialize=True,
        step_format_fixed_length=DIGITS,
        preservation_policy=AnyPreservationPolicy(kept),
        multiprocessing_options=array_store.alone(),
        async_options=ocp.AsyncOptions(
            timeout_secs=TIMEOUT,
            # What cannot be made at all is told at once.
            create_directories_asynchronously=False,
        ),
    )


def _handlers() -> Any:  # a registry of Orbax, whose type cannot be checked
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    alone = array_store.alone()
    arrays = array_store.arrays_handler(multiprocessing_options=alone)
    handlers.add(ARRAYS, ocp.args.PyTreeSave, arrays)
    json = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
    handlers.add(METADATA, ocp.args.JsonSave, json)
    return handlers
