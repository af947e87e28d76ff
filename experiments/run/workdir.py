"""The files of a repair run: what it was started with, where it stands, what it made.

    workdir/config.json       the config of the first start
    workdir/frozen/           original params, factors, directions: written once
    workdir/states/00000120/  ε, momentum, history after 120 images; the last ones
    workdir/metrics.jsonl     one line an image
    workdir/pictures/, before_after.png, repaired*, summary.json

It is a folder of a disk, or gs://bucket/name. Each file appears whole or not at all;
summary.json is the last one and ends a run, or says how far it came. No line can be
added to an object of a bucket: there metrics.jsonl is written anew before each state.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sinder_jax import checkpoint
from sinder_jax.storage import errors, paths
from sinder_jax.storage.paths import AnyPath, StrPath
from sinder_jax.storage.snapshots import Snapshots

KEPT_STATES = 2
# What may be changed when a run goes on: it does not change the result.
FREE_KEYS = (
    "checkpoint",
    "checkpoint_every",
    "keep_every",
    "keep_states",
    "log_every",
    "max_bad_steps",
    "picture_every",
    "read_threads",
    "read_workers",
    "split_model",
    "tensorboard",
    "wandb_project",
)


class Workdir:
    """Reads and writes the files of one run; see the module's list.

    Of a run of several processes one writes, and all read. A writer is to be closed, or
    what it saved last may be lost.

    Args:
      path: a folder, made if it does not exist; or gs://bucket/name.
      writes: whether this process writes; another one makes and changes nothing.
      keep_last, keep_every: which states are kept, see `snapshots.Snapshots`.

    Raises:
      OSError: it cannot be made or written to.
      ValueError: it is of a bucket, and what reads buckets is not installed.
    """

    def __init__(
        self,
        path: StrPath,
        writes: bool = True,
        *,
        keep_last: int = KEPT_STATES,
        keep_every: int = 0,
    ):
        self.path = paths.as_path(path)
        self.writes = writes
        self._kept = {"keep_last": keep_last, "keep_every": keep_every}
        self._config: dict[str, Any] = {}
        self._lines: list[str] | None = None  # of metrics.jsonl, only for a bucket
        self._states: Snapshots | None = None
        if writes:
            self._make()

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _make(self) -> None:
        probe = self.path / f".writable.{os.getpid()}"
        try:
            with paths.answering(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                probe.write_text("")
                probe.unlink()
        except OSError as error:
            raise OSError(
                f"--workdir={self.path} cannot be written to: {_reason(error)}"
            ) from None
        if not paths.is_remote(self.path):
            for name in ("frozen", "repaired"):  # what a kill left of hours of writing
                for partial in Path(self.path).glob(f".{name}.*/"):
                    paths.remove(partial)

    # --- Config ---------------------------------------------------------------------

    def settle_config(
        self, config: ConfigDict, *, images_per_step: int, force: bool = False
    ) -> None:
        """Stores the config, or holds it against the one the run was started with.

        Args:
          config: its `images_per_step`, where 0, is set: to the stored one or, at the
            first start, to the argument.
          images_per_step: the number to start with.
          force: go on with a config that changes the result. The one before is kept as
            config.json.before_1 and so on.

        Raises:
          ValueError: a key that changes the result differs; names each.
        """
        path = self.path / "config.json"
        if not self.frozen.exists():  # nothing has been computed by another config
            config.images_per_step = config.images_per_step or images_per_step
            self._store_config(config)
            return
        stored = _read_json(path)
        config.images_per_step = config.images_per_step or stored["images_per_step"]
        changed = "; ".join(
            f"{key} was {stored.get(key)!r} and is {value!r}"
            for key, value in config.items()
            if stored.get(key) != value and key not in FREE_KEYS
        )
        if changed and not force:
            raise ValueError(
                f"{self.path} holds a run with another config: {changed}. Choose "
                "another --workdir, or go on with what it was started with; --force "
                "goes on with the new one."
            )
        if changed and self.writes:
            before = self._keep_config(path)
            print(
                f"warning: {self.path} goes on with another config: {changed}. The one "
                f"before is {before.name}.",
                file=sys.stderr,
            )
            self._store_config(config)
        self._config = config.to_dict()

    def _store_config(self, config: ConfigDict) -> None:
        self._config = config.to_dict()
        if self.writes:
            text = json.dumps(self._config, indent=2) + "\n"
            write_text(self.path / "config.json", text)

    def _keep_config(self, path: AnyPath) -> AnyPath:
        number = 1
        while (before := path.with_name(f"{path.name}.before_{number}")).exists():
            number += 1
        write_text(before, path.read_text())
        return before

    def _check_there(self) -> None:
        """Before anything is written: nobody is to find half a run.

        Raises:
          OSError: the folder was removed since the run was started.
        """
        if not self.writes:
            raise RuntimeError("this process must leave writing to another one.")
        if paths.is_remote(self.path):
            return
        settled = not self._config or (self.path / "config.json").exists()
        if not (self.path.is_dir() and settled):
            raise FileNotFoundError(
                f"--workdir={self.path} was removed while the run was going on: "
                "nothing more is written."
            )

    # --- Frozen model and states ----------------------------------------------------

    @property
    def frozen(self) -> AnyPath:
        """The checkpoint of what a repair reads and never changes."""
        return self.path / "frozen"

    @property
    def states(self) -> AnyPath:
        """The folder of the states."""
        return self.path / "states"

    def save_state(
        self,
        num_images: int,
        saved: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to write a state (`repair.to_saved`), after the metrics up to it.

        Its arrays may be changed at once. Old states are removed once it is there.

        Args:
          num_images: images passed so far, also the position in the training list.
          saved: nested dicts of arrays.
          metadata: JSON values to be kept beside the config.

        Raises:
          OSError: it cannot be written, or the one before could not.
        """
        self._check_there()
        self._sync_metrics()
        told = {"config": self._config, "position": num_images}
        self._open_states().save(num_images, saved, {**told, **(metadata or {})})

    def load_state(self) -> dict[str, Any] | None:
        """The newest state whose bytes are whole, or None on a first start.

        Newer ones that are damaged are said and set aside under another name, by the
        process that writes. The others are to load when that one has loaded.

        Raises:
          store.DamagedError: there are states, and all are damaged.
        """
        if not self.writes:
            newest = checkpoint.load_newest(self.states)
            return None if newest is None else newest.tree
        states = self._open_states()
        newest = states.load_newest()
        if newest is None:
            return None
        for path, error in newest.damaged.items():
            aside = states.set_aside(path)
            print(
                f"warning: {error} It is set aside as {aside.name}; going on from the "
                f"one before, {newest.path.name}.",
                file=sys.stderr,
            )
        return newest.tree

    def wait(self) -> None:
        """Waits until the state saved last is there, or raises OSError."""
        if self._states is not None:
            self._states.wait()

    def close(self) -> None:
        """As `wait`, then ends what runs in the background; metrics are written."""
        states, self._states = self._states, None
        try:
            self._sync_metrics()
        finally:
            if states is not None:
                states.close()

    def _open_states(self) -> Snapshots:
        if self._states is None:
            self.states.mkdir(exist_ok=True)
            self._states = Snapshots(self.states, **self._kept)
        return self._states

    # --- Metrics --------------------------------------------------------------------

    @property
    def metrics(self) -> AnyPath:
        """One JSON object a line for every image, in order."""
        return self.path / "metrics.jsonl"

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines. They reach a disk's file at once, a bucket with the next state.

        Raises:
          OSError: they cannot be written, or a state could not (`Snapshots.check`).
        """
        lines = [json.dumps(row) + "\n" for row in rows]
        self._check_there()
        if self._states is not None:
            self._states.check()
        if paths.is_remote(self.path):
            self._lines = self._read_lines()
            self._lines += lines
            return
        with _naming(self.metrics), self.metrics.open("a") as file:
            file.writelines(lines)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines, up to the first that is not."""
        return [json.loads(line) for line in self._read_lines()]

    def rewind_metrics(self, num_images: int) -> None:
        """Drops the lines of images that a run going on from there will see again.

        And what follows a line that a kill cut.
        """
        lines = self._read_lines()
        kept = [line for line in lines if json.loads(line)["image"] < num_images]
        self._check_there()
        self._lines = kept if paths.is_remote(self.path) else None
        write_text(self.metrics, "".join(kept))

    def _read_lines(self) -> list[str]:
        if self._lines is not None:
            return self._lines
        if not self.metrics.exists():
            return []
        lines = []
        for line in self.metrics.read_bytes().split(b"\n")[:-1]:
            if not _is_row(line):
                break
            lines.append(line.decode() + "\n")
        return lines

    def _sync_metrics(self) -> None:
        """Before a state: one that is there must not lack the lines up to it."""
        if self._lines is not None:
            write_text(self.metrics, "".join(self._lines))
        elif self.writes and not paths.is_remote(self.path) and self.metrics.exists():
            with _naming(self.metrics), self.metrics.open("a") as file:
                os.fsync(file.fileno())

    # --- What it made ---------------------------------------------------------------

    @property
    def pictures(self) -> AnyPath:
        """Folder of the pictures made on the way."""
        return self.path / "pictures"

    @contextmanager
    def output(self, name: str) -> Iterator[Path]:
        """A path of a disk to write to; what is there then is in the workdir.

        In a bucket with all that was written beside it.

        Args:
          name: below the workdir, such as "pictures/image_00000020.png".

        Raises:
          OSError: it cannot be written.
        """
        self._check_there()
        target = self.path / name
        if not paths.is_remote(target):
            target.parent.mkdir(exist_ok=True)
            yield Path(target)
            return
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, target.name)
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    place = target.parent / file.relative_to(folder)
                    with paths.answering(place):
                        place.write_bytes(file.read_bytes())

    @property
    def summary(self) -> AnyPath:
        """The numbers of a run that is finished, or how far it came."""
        return self.path / "summary.json"

    def write_summary(self, values: Mapping[str, Any]) -> None:
        """Writes summary.json, after the states and metrics it tells of."""
        self._check_there()
        self._sync_metrics()
        self.wait()
        write_text(self.summary, json.dumps(values, indent=2) + "\n")

    def finished(self) -> bool:
        """Whether the run came to its end: summary.json says so."""
        return self.summary.exists() and _read_json(self.summary).get("finished", False)


def write_text(path: AnyPath, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
      OSError: it cannot be written; names it.
    """
    if paths.is_remote(path):
        with paths.answering(path):
            path.write_text(text)
        return
    partial = path.with_name(f".{path.name}.partial")
    with _naming(path):
        partial.write_text(text)
        os.replace(partial, path)


@contextmanager
def _naming(path: AnyPath) -> Iterator[None]:
    """Names the file in an error of a write: a full disk's own does not."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _read_json(path: AnyPath) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({errors.reason_of(error)}).") from None


def _is_row(line: bytes) -> bool:
    try:
        return "image" in json.loads(line)
    except (ValueError, TypeError):
        return False
