"""The files of a repair run: what it was started with, where it stands, what it made.

    workdir/config.json       the config of the first start
    workdir/frozen/           original params, factors, directions: written once
    workdir/states/00000120/  ε, momentum, history after 120 images; the last two
    workdir/metrics.jsonl     one line an image
    workdir/pictures/, before_after.png, repaired*, summary.json

Each file appears whole or not at all; summary.json is the last one and ends a run.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sinder_jax import checkpoint

KEPT_STATES = 2
# What may be changed when a run goes on: it does not change the result.
FREE_KEYS = (
    "checkpoint",
    "checkpoint_every",
    "log_every",
    "picture_every",
    "read_threads",
)


class Workdir:
    """Reads and writes the files of one run; see the module's list.

    Args:
      path: a folder, made if it does not exist.

    Raises:
      OSError: it cannot be made or written to.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        probe = self.path / f".writable.{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            reason = error.strerror
            raise OSError(f"--workdir={path} cannot be written to: {reason}") from None

    # --- Config ---------------------------------------------------------------------

    def settle_config(self, config: ConfigDict, *, images_per_step: int) -> None:
        """Stores the config, or holds it against the one the run was started with.

        Args:
          config: its `images_per_step`, where 0, is set: to the stored one or, at the
            first start, to the argument.
          images_per_step: the number to start with.

        Raises:
          ValueError: a key that changes the result differs; names each.
        """
        path = self.path / "config.json"
        if not self.frozen.exists():  # nothing has been computed by another config
            config.images_per_step = config.images_per_step or images_per_step
            write_text(path, json.dumps(config.to_dict(), indent=2) + "\n")
            return
        stored = json.loads(path.read_text())
        config.images_per_step = config.images_per_step or stored["images_per_step"]
        changed = [
            f"{key} was {stored.get(key)!r} and is {value!r}"
            for key, value in config.items()
            if stored.get(key) != value and key not in FREE_KEYS
        ]
        if changed:
            raise ValueError(
                f"{self.path} holds a run with another config: {'; '.join(changed)}. "
                "Choose another --workdir, or go on with what it was started with."
            )

    # --- Frozen model and states ----------------------------------------------------

    @property
    def frozen(self) -> Path:
        """The checkpoint of what a repair reads and never changes."""
        return self.path / "frozen"

    def save_state(self, num_images: int, saved: Mapping[str, Any]) -> None:
        """Writes a state (`repair.to_saved`) and removes all but the newest."""
        target = self.states / f"{num_images:08d}"
        target.parent.mkdir(exist_ok=True)
        if not target.exists():
            checkpoint.save_tree(target, saved, {"num_images": num_images})
        for old in checkpoint.numbered(self.states)[:-KEPT_STATES]:
            shutil.rmtree(old)

    def load_state(self) -> dict[str, Any] | None:
        """The newest state whose bytes are whole, or None on a first start.

        Newer ones that are damaged are said, and set aside under another name.

        Raises:
          store.DamagedError: there are states, and all are damaged.
        """
        newest = checkpoint.load_newest(self.states)
        if newest is None:
            return None
        for path, error in newest.damaged.items():
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            print(
                f"warning: {error} It is set aside as {aside.name}; going on from the "
                f"one before, {newest.path.name}.",
                file=sys.stderr,
            )
        return newest.tree

    @property
    def states(self) -> Path:
        """The folder of the states."""
        return self.path / "states"

    # --- Metrics --------------------------------------------------------------------

    @property
    def metrics(self) -> Path:
        """One JSON object a line for every image, in order."""
        return self.path / "metrics.jsonl"

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines; they reach the file at once."""
        with self.metrics.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def rewind_metrics(self, num_images: int) -> None:
        """Drops the lines of images that a run going on from there will see again."""
        rows = [row for row in self.read_metrics() if row["image"] < num_images]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(self.metrics, text)

    @property
    def pictures(self) -> Path:
        """Folder of the pictures made on the way."""
        return self.path / "pictures"

    # --- The end --------------------------------------------------------------------

    @property
    def summary(self) -> Path:
        """The numbers of a finished run."""
        return self.path / "summary.json"


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
