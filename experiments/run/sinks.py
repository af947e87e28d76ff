"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, both optional.

    row of an image, picture --Sinks--> workdir/tensorboard/, wandb, or nowhere

Both are off unless the config names them. A sink that fails during a run is reported
once and left out from then on: a repair does not die of its dashboard. Only process 0
opens sinks.
"""

import importlib
import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from ml_collections import ConfigDict

from experiments.run.claim import LostError
from sinder_jax import cli
from sinder_jax.storage import files

NUMBERS = ("readable", "layer", "loss", "alpha", "num_outliers", "finite", "skipped")
FLUSH_SECONDS = 30.0  # between two writes of the event file
FINISH_SECONDS = 20.0  # for wandb's last upload: a preempted host has little time left
RGB = UInt8[np.ndarray, "height width 3"]


class Sinks:
    """All sinks of a run; use as a context manager.

    Write only after `Workdir.check`: event files are in the workdir.

    A sink has the methods `write(image, numbers)`, `picture(name, rgb, image)` and
    `close()`, each of which may raise anything.
    """

    def __init__(self) -> None:
        self._sinks: dict[str, Any] = {}

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Closes, unless the run has lost its workdir."""
        if not isinstance(error, LostError):
            self.close()

    def add(self, name: str, make: Callable[[], Any]) -> None:
        """Opens a sink; warns and leaves it out if that fails."""
        try:
            self._sinks[name] = make()
        except Exception as error:
            cli.warn(f"{name} cannot be opened, going on without it: {error!r}")

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes the numbers of an image's row of the metrics, except None."""
        numbers = {k: float(row[k]) for k in NUMBERS if row.get(k) is not None}
        if numbers.get("layer", 0) < 0:
            del numbers["layer"]  # -1 stands for no defect, not for a block
        self._each("write", row["image"], numbers)

    def picture(self, name: str, rgb: RGB, image: int) -> None:
        """Writes a picture made after `image` images."""
        self._each("picture", name, rgb, image)

    def close(self) -> None:
        """Writes everything that is pending and closes the sinks."""
        self._each("close")
        self._sinks = {}

    def _each(self, method: str, *arguments: Any) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                getattr(sink, method)(*arguments)
            except Exception as error:  # network, disk: many kinds
                del self._sinks[name]
                cli.warn(f"{name} failed, going on without it: {error!r}")


def check_packages(config: ConfigDict) -> None:
    """Imports the packages that the config needs, before anything that takes long.

    Raises:
      ValueError: a package is missing; says how to install it.
    """
    for key, package, extra in (
        ("tensorboard", "tensorboardX", "tensorboard"),
        ("wandb_project", "wandb", "wandb"),
    ):
        try:
            if config[key]:
                importlib.import_module(package)
        except ImportError as error:
            raise ValueError(
                f"config.{key} needs {package} ({error}): pip install {package}, or "
                f"'sinder_jax[{extra}]'"
            ) from None


def open_sinks(config: ConfigDict, workdir: Any, *, start: int) -> Sinks:
    """Opens the sinks that a config names.

    Args:
      config: `tensorboard`, and `wandb_project`, empty for none.
      workdir: a path, which may be remote.
      start: images passed before. Replaces later rows, which a killed run may have
        left.

    Raises:
      ValueError: as `check_packages`.
    """
    check_packages(config)
    workdir, sinks = epath.Path(workdir), Sinks()
    if config.tensorboard:
        sinks.add("TensorBoard", lambda: TensorBoard(workdir / "tensorboard", start))
    if config.wandb_project:
        sinks.add("wandb", lambda: Wandb(config, workdir, start))
    return sinks


class TensorBoard:
    """Event files, written by tensorboardX without TensorFlow.

    Not by tensorboardX's SummaryWriter: it passes events to a thread through a queue of
    ten, and waits forever once a full disk has killed that thread. Events are kept here
    until a flush: what the file's own buffer holds is written at exit, even by a run
    that has lost its workdir.

    Args:
      folder: of the event files.
      start: TensorBoard drops what earlier files hold from this image on.
    """

    def __init__(self, folder: Any, start: int):
        from tensorboardX import event_file_writer, proto, summary

        self._summary, self._event = summary, proto.event_pb2.Event
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, which hold the second of
        # the start. This suffix keeps two starts within a second apart, in order.
        suffix = f".{time.time_ns()}"
        self._events = event_file_writer.EventsWriter(str(folder / "events"), suffix)
        self._pending: list[Any] = []
        log = proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START)
        self._add(start, session_log=log)
        self._flush()

    def write(self, image: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._add(image, summary=self._summary.scalar(f"repair/{name}", value))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def picture(self, name: str, rgb: RGB, image: int) -> None:
        self._add(image, summary=self._summary.image(name, rgb, dataformats="HWC"))
        self._flush()

    def close(self) -> None:
        self._flush()
        self._events.close()

    def _add(self, step: int, **content: Any) -> None:
        event = self._event(step=step, wall_time=time.time(), **content)
        self._pending.append(event)

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        for event in pending:
            self._events.write_event(event)
        self._events.flush()
        self._flushed = time.monotonic()


class Wandb:
    """A run of Weights & Biases, the same one after every resume.

    The workdir holds the run's id. Without network or login, wandb writes an offline
    run, to be uploaded by `wandb sync`. wandb's steps only increase: rows from before a
    kill stay and are not sent again. (The rows are the same: a resumed run repeats its
    trajectory. An offline run does not know what earlier ones sent.)

    Args:
      config: shown in full; `wandb_project` names the project.
      workdir: holds the id and, if local, offline runs; its name is the run's name.
      start: images passed before.
    """

    def __init__(self, config: ConfigDict, workdir: Any, start: int):
        import wandb

        self._make_image, self._last = wandb.Image, start
        options: dict[str, Any] = {
            "project": config.wandb_project,
            "name": cli.shown(workdir.name),
            "id": _run_id(workdir),
            "resume": "allow",
            "config": {
                key: cli.shown(value) if isinstance(value, str) else value
                for key, value in config.items()
            },
            "allow_val_change": True,  # of keys that a resume may change
            "dir": None if "://" in str(workdir) else str(workdir),
            # Capturing the terminal's output would redraw the live line as text.
            "settings": wandb.Settings(console="off", finish_timeout=FINISH_SECONDS),
        }
        try:
            self._run = wandb.init(**options)
        except Exception as error:  # not logged in, no network: many kinds
            cli.warn(f"wandb is written offline, for `wandb sync`: {error!r}")
            self._run = wandb.init(**options, mode="offline")
        self._first = max(start, self._run.starting_step)

    def write(self, image: int, numbers: Mapping[str, float]) -> None:
        self._last = image
        self._log({f"repair/{name}": value for name, value in numbers.items()})

    def picture(self, name: str, rgb: RGB, image: int) -> None:
        # At the step of the last row: rows of earlier images may still come, and wandb
        # drops a row that follows a later step.
        self._log({name: self._make_image(rgb, caption=f"after {image} images")})

    def close(self) -> None:
        self._run.finish()

    def _log(self, content: dict[str, Any]) -> None:
        if self._last >= self._first:
            self._run.log(content, step=self._last)


def _run_id(workdir: Any) -> str:
    path = workdir / "wandb_id"
    stored = path.read_bytes() if path.exists() else b""
    if not re.fullmatch(rb"\w+\s*", stored):  # none yet, or damaged
        stored = secrets.token_hex(4).encode()
        files.write(path, stored)
    return stored.decode().strip()
