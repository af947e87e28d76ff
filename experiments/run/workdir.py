"""The files of a repair, as the run itself reads and writes them.

    config, states, metrics, pictures, summary --Workdir--> DIR or gs://bucket/name

`storage.run_files` lists the files. Each appears whole or not at all, and only while
the run owns the folder (`claim`). summary.json is last: it says that the run is
finished, or how far it came. An object in a bucket cannot grow, so there metrics.jsonl
is written again before each state.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from experiments.run.claim import Claim
from sinder_jax import checkpoint, cli
from sinder_jax.storage import files, paths, run_files
from sinder_jax.storage.errors import DamagedError
from sinder_jax.storage.paths import AnyPath, StrPath
from sinder_jax.storage.snapshots import Snapshots


def check_free(path: StrPath) -> None:
    """Refuses a workdir that something else uses, before anything is written.

    Files that no repair writes are let be.

    Args:
      path: as of a `Workdir`; need not exist.

    Raises:
      ValueError: it holds an evaluation, or a config.json or summary.json of something
        else.
      OSError: it cannot be read.
    """
    folder = paths.as_path(path)
    with paths.answering(folder):
        held = [run_files.holds(folder, name) for name in run_files.KEYS]
    for what in held:
        if what not in ("", run_files.REPAIR):
            raise ValueError(f"{folder} holds {what}: choose another --workdir")


class Workdir:
    """Reads and writes the files of one run.

    Only process 0 of a run writes. Close a workdir that writes, or its last state may
    be lost. Every method that writes raises `claim.LostError` once another run has
    taken the folder over.

    Args:
      path: a folder, made if it does not exist; or gs://bucket/name.
      writes: False for the other processes, which must not make or change anything.
      keep_last, keep_every: which states are kept, see `snapshots.Snapshots`.

    Attributes:
      config: the run's config once it is settled, to be stored with each state; then
        config.json must exist.
      claim: of this process to the folder; None for a process that does not write.

    Raises:
      OSError: the folder cannot be made or written to.
      ValueError: another run writes there; or a bucket, and the package that reads
        buckets is not installed.
    """

    def __init__(
        self,
        path: StrPath,
        writes: bool = True,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
    ):
        self.path = paths.as_path(path)
        self.writes = writes
        self.frozen = self.path / run_files.FROZEN
        self.states = self.path / run_files.STATES
        self.metrics = self.path / run_files.METRICS
        self.summary = self.path / run_files.SUMMARY
        self._kept: dict[str, Any] = {"keep_last": keep_last, "keep_every": keep_every}
        self.config: dict[str, Any] = {}
        self._lines: dict[int, str] | None = None  # of metrics.jsonl, only for a bucket
        self._told = ""  # the images without a line that were told
        self._states: Snapshots | None = None
        self.claim = self._make() if writes else None

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Closes. If the folder was lost, that is the error, whatever came of it."""
        try:
            self.close()
        except OSError:
            if error is None:  # else the first error counts
                self._owned().check()
                raise
        if isinstance(error, OSError) and self.claim is not None:
            self.claim.check()

    def _make(self) -> Claim:
        paths.check_is_text(self.path)  # for Orbax, which writes the states
        paths.check_has_no_backslash(self.path)
        try:
            with paths.answering(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            return Claim(self.path)
        except OSError as error:
            raise OSError(
                f"--workdir={self.path} cannot be written to: {error.strerror or error}"
            ) from None

    def check(self) -> None:
        """Refuses to write into a workdir that was lost or removed since the start.

        Call it before anything is written that no method of this class writes.

        Raises:
          LostError: another run has taken the folder over.
          OSError: the folder is gone.
        """
        self._owned().check()
        if paths.is_remote(self.path):
            return
        settled = not self.config or (self.path / run_files.CONFIG).exists()
        if not (self.path.is_dir() and settled):
            raise FileNotFoundError(
                f"--workdir={self.path} was removed during the run: "
                "nothing more is written"
            )

    def _owned(self) -> Claim:
        if self.claim is None:
            raise RuntimeError("this process must leave writing to process 0")
        return self.claim

    def write(self, name: str, content: str) -> None:
        """Writes a small file of the workdir, whole or not at all."""
        self.check()
        self._owned().write(name, content)

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes an object as JSON; as `write`."""
        self.write(name, json.dumps(values, indent=2) + "\n")

    # --- States ---------------------------------------------------------------------

    def save_state(
        self,
        num_images: int,
        saved: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to save a state (`repair.to_saved`), after the metrics up to it.

        The arrays may be changed at once. Removes old states once this one is saved.

        Args:
          num_images: images passed so far, also the position in the training list.
          saved: nested dicts of arrays.
          metadata: JSON values to store with it, besides the config.

        Raises:
          OSError: this state, or the previous one, cannot be written.
        """
        self.check()
        self._sync_metrics()
        values = {"config": self.config, "position": num_images}
        self._open_states().save(num_images, saved, {**(metadata or {}), **values})

    def load_state(self) -> checkpoint.Newest | None:
        """Returns the newest undamaged state, or None on a first start.

        Reports newer, damaged ones and renames them.

        Raises:
          DamagedError: there are states, and all are damaged.
        """
        self.check()
        if not self.states.exists():
            return None
        states = self._open_states()
        try:
            newest = states.load_newest()
        except DamagedError as error:
            told = f"{error}; move them away to start again from the first image"
            raise DamagedError(told) from None
        if newest is None:
            return None
        for path, damage in newest.damaged.items():
            aside = states.set_aside(path)
            cli.warn(
                f"{damage}; it is set aside as {aside.name}, going on from the "
                f"one before, {newest.path.name}"
            )
        return newest

    def wait(self) -> None:
        """Waits until the last state is saved, or raises OSError."""
        if self._states is not None:
            self._states.wait()

    def close(self) -> None:
        """Writes the metrics, waits for pending saves, gives the folder up."""
        states, self._states = self._states, None
        with ExitStack() as stack:
            if self.claim is not None:
                stack.callback(self.claim.release)
            if states is not None:
                stack.callback(states.close)
            self._sync_metrics()

    def _open_states(self) -> Snapshots:
        if self._states is None:
            self.states.mkdir(exist_ok=True)
            if not paths.is_remote(self.path):
                files.flush_entry(Path(self.path))
            claim = self._owned()
            self._states = Snapshots(
                self.states, **self._kept, check=claim.check, staging=claim.staging
            )
        return self._states

    # --- Metrics --------------------------------------------------------------------

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines. A file on a disk has them at once, a bucket with the next state.

        Raises:
          OSError: the lines, or a state before them, cannot be written.
        """
        lines = {row["image"]: json.dumps(row) + "\n" for row in rows}
        self.check()
        if self._states is not None:
            self._states.check()
        if paths.is_remote(self.path):
            self._lines = self._read_lines() | lines
            return
        with _naming(self.metrics), self.metrics.open("a") as file:
            file.writelines(lines.values())

    def rewind_metrics(self, num_images: int) -> None:
        """Keeps one line for each image that the run has passed, in their order.

        Drops the lines of images that the run will see again, and what is no line of an
        image. Warns, once, if lines of images before are lacking; and if there are
        lines but no state, so that the run starts again.

        Args:
          num_images: images passed, as the state says.
        """
        lines = self._read_lines()
        kept = {image: line for image, line in lines.items() if image < num_images}
        if lines and not num_images:
            cli.warn(f"{self.path} holds no state: starting again from image 0")
        lacking = run_files.lacking(kept, num_images)
        images = lacking.rpartition(":")[2]
        if images not in ("", self._told):
            cli.warn(f"{self.path}: {lacking}")
            self._told = images
        self._lines = kept if paths.is_remote(self.path) else None
        text = "".join(kept.values())
        if not self.metrics.exists() or self.metrics.read_bytes() != text.encode():
            self.write(self.metrics.name, text)

    def _read_lines(self) -> dict[int, str]:
        if self._lines is not None:
            return self._lines
        return run_files.read_metrics_lines(self.path)

    def _sync_metrics(self) -> None:
        """Makes the lines durable: no state may exist without the lines up to it."""
        if self._lines is not None:
            self.write(self.metrics.name, "".join(self._lines.values()))
        elif self.writes and not paths.is_remote(self.path) and self.metrics.exists():
            with _naming(self.metrics):
                files.flush(Path(self.metrics))

    # --- Results --------------------------------------------------------------------

    @contextmanager
    def output(self, name: str) -> Iterator[Path]:
        """Yields a local path to write to; afterwards the file is in the workdir.

        Files written beside it are in the workdir, too.

        Args:
          name: below the workdir, such as "pictures/image_00000020.png".

        Raises:
          OSError: the file cannot be written.
        """
        self.check()
        with self._owned().output(name) as path:
            yield path

    @contextmanager
    def checkpoint(self, name: str) -> Iterator[AnyPath]:
        """Like `output`, for a directory that `array_store` writes.

        In a bucket it is written in its place: it may be larger than the local disk.
        """
        if paths.is_remote(self.path):
            self.check()
            yield self.path / name
        else:
            with self.output(name) as path:
                yield path

    def write_summary(self, values: Mapping[str, Any]) -> None:
        """Writes summary.json, after the states and metrics that it summarizes.

        Args:
          values: JSON values; "images", if there, is held against metrics.jsonl.
        """
        self.check()
        if "images" in values:
            self.rewind_metrics(values["images"])
        self._sync_metrics()
        self.wait()
        self.write_json(self.summary.name, values)

    def read_summary(self) -> dict[str, Any]:
        """What summary.json says; empty if it is missing or, with a warning, damaged.

        All that it says can be had again from the last state.
        """
        try:
            return run_files.read_json(self.summary)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            cli.warn(f"{error}; it is written again")
            return {}


@contextmanager
def _naming(path: AnyPath) -> Iterator[None]:
    """Adds the file's path to an error: a full disk's own error has no path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} cannot be written: {reason}") from None
