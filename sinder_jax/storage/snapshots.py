"""Snapshots of a run's state, saved in the background and loaded after a kill.

    state --save--> copy on the host --in the background--> FOLDER/00000120
    FOLDER --load_newest--> the newest snapshot that is not damaged

Orbax's CheckpointManager writes one snapshot after the other and removes old ones, the
new one being on the disk. Each is a directory as `array_store` describes it, so every
array is verified when it is read. An incomplete snapshot has another name on a disk,
and lacks Orbax's last object in a bucket. It is never loaded, and the next start
removes it.
"""

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sinder_jax import checkpoint, param_tree
from sinder_jax.storage import array_store, files, header, orbax_io, paths
from sinder_jax.storage.errors import reason_of
from sinder_jax.storage.paths import AnyPath, StrPath

ARRAYS, METADATA = "arrays_0", "metadata"
DIGITS = 8  # of a directory's name
TIMEOUT = 600  # seconds after which a save in the background counts as failed


class Snapshots:
    """Saves states in the background and loads the newest good one.

    Waits for no other process: with many hosts, only process 0 creates one, and the
    others read with `checkpoint.load_newest`. Close it, or the last state may be lost.

    Args:
      folder: a directory that exists, or gs://bucket/name.
      keep_last: how many of the newest snapshots to keep.
      keep_every: also keep those whose number of images is a multiple of this; 0: none.
      check: called before a snapshot appears or anything is removed; raises to forbid.
      staging: where a snapshot is written first, on the same disk; None: beside its
        place.
      counted: what the numbers of the snapshots count, for messages.

    Raises:
      FileNotFoundError: there is no such directory.
      OSError: the folder cannot be read.
      RuntimeError: on another process than 0, whose arrays Orbax would leave out.
    """

    def __init__(
        self,
        folder: StrPath,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        check: Callable[[], None] = lambda: None,
        staging: Path | None = None,
        counted: str = "images",
    ):
        if keep_last < 1 or keep_every < 0:
            raise ValueError(
                "keep_last must be at least 1 and keep_every at least 0, got "
                f"{keep_last} and {keep_every}"
            )
        orbax_io.check_may_write()
        self.folder = paths.located(folder)
        self._check_folder()
        self._saving, self._counted = 0, counted  # the state under way
        self._exit = ExitStack()
        self._exit.enter_context(orbax_io.quiet())
        self._check = check
        commit = _committing(self.folder, check, staging)
        self._options = _options(keep_last, keep_every, commit)
        with paths.answering(self.folder):
            self._manager = self._open()

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def save(
        self,
        num_images: int,
        tree: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to save a state; does nothing if it is stored already.

        Copies the arrays before it returns, so that they may be changed or donated.
        Waits for the previous save to finish.

        Args:
          num_images: images passed so far, which names the snapshot.
          tree: nested dicts of NumPy or JAX arrays, each whole in this process.
          metadata: JSON values to store with it, besides `num_images` and `versions`.

        Raises:
          OSError: this snapshot or the previous one cannot be written.
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
        entries = {name: header.entry(name, x, part=0) for name, x in flat.items()}
        added = {"num_images": num_images, "versions": versions()}
        found = header.header(entries, {**(metadata or {}), **added})
        items = {
            ARRAYS: orbax_io.arrays_args(param_tree.unflatten(flat)),
            METADATA: ocp.args.JsonSave(found),
        }
        self._saving = num_images
        with self._one_line():
            self._manager.save(num_images, args=ocp.args.Composite(**items), force=True)

    def check(self) -> None:
        """Raises OSError if the last save has failed; never waits."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is complete, or raises OSError."""
        with self._one_line():
            self._manager.wait_until_finished()

    def load_newest(self) -> checkpoint.Newest | None:
        """Waits for a pending save, then `checkpoint.load_newest`."""
        self.wait()
        return checkpoint.load_newest(self.folder)

    def set_aside(self, path: AnyPath) -> AnyPath:
        """Renames a damaged snapshot so that it is not loaded; returns the new path."""
        aside = path.with_name(f"{path.name}.damaged")
        paths.remove(aside)
        path.rename(aside)
        self._manager.reload()
        return aside

    def close(self) -> None:
        """Waits for a pending save, then stops the background threads."""
        with self._exit:
            try:
                self.wait()
            finally:
                self._manager.close()

    def _open(self) -> "_Manager":
        self._check()
        handlers = _handlers()
        manager = _Manager(
            self.folder, options=self._options, handler_registry=handlers
        )
        orbax_io.wait_for_writes()  # removes what was left unfinished
        return manager

    def _check_folder(self) -> None:
        """Raises if the folder was removed: Orbax would create it again."""
        if not paths.is_remote(self.folder) and not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} does not exist (any more)")

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Raises errors of Orbax and TensorStore as an OSError of one line."""
        try:
            yield
        except Exception as error:
            with suppress(Exception):  # the error that counts is the first one
                orbax_io.wait_for_writes()
                failed, self._manager = self._manager, self._open()
                failed.close()
            raise OSError(
                f"{self.folder}: the state after {self._saving} {self._counted} could "
                f"not be saved ({reason_of(error)}); earlier ones are untouched"
            ) from None


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: JAX answers only if all processes ask at the same step."""
        return False


class _Flushed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A directory whose bytes are on the disk before it gets its final name."""

    async def finalize(self) -> None:
        """Flushes, renames, and flushes the rename."""
        files.flush(Path(self.get()))
        await super().finalize()
        files.flush_entry(Path(self.get_final().parent))


def _committing(
    folder: AnyPath, check: Callable[[], None], staging: Path | None
) -> type:
    """How a snapshot appears in the folder, once `check` allows it."""
    # In a bucket every object is whole, and the last one completes the snapshot.
    remote, atomicity = paths.is_remote(folder), ocp.path.atomicity
    base: Any = atomicity.CommitFileTemporaryPath if remote else _Flushed

    class Checked(base):
        @classmethod
        def from_final(cls, final_path, **options):
            if remote or staging is None:
                return super().from_final(final_path, **options)
            name = f"{final_path.name}{atomicity.TMP_DIR_SUFFIX}"
            return cls(epath.Path(staging) / name, final_path, **options)

        async def finalize(self):
            check()
            await super().finalize()

    return Checked


def versions() -> dict[str, str]:
    """Versions of everything that writes a snapshot."""
    return {
        "sinder_jax": array_store.tool().partition(" ")[2] or "unknown",
        "jax": jax.__version__,
        "orbax": ocp.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _options(
    keep_last: int, keep_every: int, commit: type
) -> ocp.CheckpointManagerOptions:
    return ocp.CheckpointManagerOptions(
        create=False,  # with `active_processes` Orbax cannot
        save_root_metadata=False,
        cleanup_tmp_directories=True,
        lightweight_initialize=True,
        step_format_fixed_length=DIGITS,
        max_to_keep=keep_last,
        keep_period=keep_every or None,
        temporary_path_class=commit,
        multiprocessing_options=orbax_io.alone(),
        async_options=ocp.AsyncOptions(
            timeout_secs=TIMEOUT,
            # Reports at once what cannot be created at all.
            create_directories_asynchronously=False,
        ),
    )


def _handlers() -> Any:  # a registry of Orbax, whose type cannot be checked
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    alone = orbax_io.alone()
    arrays = orbax_io.arrays_handler(multiprocessing_options=alone)
    handlers.add(ARRAYS, ocp.args.PyTreeSave, arrays)
    json = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
    handlers.add(METADATA, ocp.args.JsonSave, json)
    return handlers
