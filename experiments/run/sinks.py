"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, both optional.

    row of an image, picture --Sinks--> workdir/tensorboard/, wandb, or nowhere

Both are off unless the config names them. A sink that fails on the way is said once and
left out from there on: a repair does not die of its dashboard. Of many processes only
the first opens sinks.
"""

import importlib
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath
from jaxtyping import UInt8
from ml_collections import ConfigDict

NUMBERS = (
    "readable",
    "layer",
    "loss",
    "alpha",
    "num_outliers",
    "finite",
    "skipped",
)
FLUSH_SECONDS = 30.0  # between two writes of the event file
FINISH_SECONDS = 20.0  # for wandb's last upload: a preempted host has not many more
RGB = UInt8[np.ndarray, "height width 3"]


class Sink(Protocol):
    """One place where metrics go; any of its methods may raise anything."""

    def write(self, image: int, numbers: Mapping[str, float]) -> None: ...

    def picture(self, name: str, rgb: RGB, image: int) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """All sinks of a run; use as a context manager."""

    def __init__(self) -> None:
        self._sinks: dict[str, Sink] = {}

    def __enter__(self) -> "Sinks":
        """Nothing more to open."""
        return self

    def __exit__(self, *exception: Any) -> None:
        """Closes all, however the loop ended."""
        self.close()

    def add(self, name: str, make: Callable[[], Sink]) -> None:
        """Opens one more; where that fails it is said, and left out."""
        try:
            self._sinks[name] = make()
        except Exception as error:
            warn(f"{name} cannot be opened, going on without it: {error!r}")

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes an image's row of the metrics; what is None in it is left out."""
        numbers = {k: float(row[k]) for k in NUMBERS if row.get(k) is not None}
        if numbers.get("layer", 0) < 0:
            del numbers["layer"]  # no defect is no block
        self._each(lambda sink: sink.write(row["image"], numbers))

    def picture(self, name: str, rgb: RGB, image: int) -> None:
        """Writes a picture made after `image` images."""
        self._each(lambda sink: sink.picture(name, rgb, image))

    def close(self) -> None:
        """Writes what is left."""
        self._each(lambda sink: sink.close())
        self._sinks = {}

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                call(sink)
            except Exception as error:  # the network's, the disk's, of many kinds
                del self._sinks[name]
                warn(f"{name} failed, going on without it: {error!r}")


def check_packages(config: ConfigDict) -> None:
    """Imports what the config asks for: call it before anything that takes long.

    Raises:
      ValueError: a package is missing; says how to install it.
    """
    if config.tensorboard:
        _package("tensorboardX", "config.tensorboard", "tensorboard")
    if config.wandb_project:
        _package("wandb", "config.wandb_project", "wandb")


def open_sinks(config: ConfigDict, workdir: Any, *, start: int) -> Sinks:
    """The sinks that a config names.

    Args:
      config: `tensorboard`, and `wandb_project`, empty for none.
      workdir: a path, which may be remote.
      start: images passed before; rows from there on, if a killed run left any, are
        replaced.

    Raises:
      ValueError: as `check_packages`.
    """
    check_packages(config)
    workdir, sinks = epath.Path(workdir), Sinks()
    # A disk or network that fails now is no more reason to stop than later.
    if config.tensorboard:
        sinks.add("TensorBoard", lambda: TensorBoard(workdir / "tensorboard", start))
    if config.wandb_project:
        sinks.add("wandb", lambda: Wandb(config, workdir, start))
    return sinks


class TensorBoard:
    """Event files, written by tensorboardX without TensorFlow.

    Not by its SummaryWriter: that one hands events to a thread by a queue of ten and
    waits for ever once the thread has died of a full disk.

    Args:
      folder: of the event files.
      start: TensorBoard forgets what earlier files hold from this image on.
    """

    def __init__(self, folder: Any, start: int):
        from tensorboardX import event_file_writer, proto, summary

        self._summary, self._event = summary, proto.event_pb2.Event
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, which hold the second of
        # the start: two starts within one are two files, in order, by this end.
        end = f".{time.time_ns()}"
        self._events = event_file_writer.EventsWriter(str(folder / "events"), end)
        log = proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START)
        self._add(start, session_log=log)
        self._events.flush()
        self._flushed = time.monotonic()

    def write(self, image: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._add(image, summary=self._summary.scalar(f"repair/{name}", value))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def picture(self, name: str, rgb: RGB, image: int) -> None:
        drawn = self._summary.image(name, rgb, dataformats="HWC")
        self._add(image, summary=drawn)
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _add(self, step: int, **content: Any) -> None:
        event = self._event(step=step, wall_time=time.time(), **content)
        self._events.write_event(event)


class Wandb:
    """A run of Weights & Biases, the same one after every resume.

    Its id lies in the workdir. Without network or login it is written as an offline
    run, to be uploaded by `wandb sync`. wandb's steps only rise: rows it has from
    before a kill stay, and are not sent again. (They are the same: a resumed run
    repeats its trajectory. An offline run does not know what earlier ones sent.)

    Args:
      config: all of it is shown; `wandb_project` names the project.
      workdir: where the id lies, and offline runs if it is local; its name is the
        run's.
      start: images passed before.
    """

    def __init__(self, config: ConfigDict, workdir: Any, start: int):
        import wandb

        self._make_image, self._last = wandb.Image, start
        options: dict[str, Any] = {
            "project": config.wandb_project,
            "name": workdir.name,
            "id": _run_id(workdir),
            "resume": "allow",
            "config": config.to_dict(),
            "allow_val_change": True,  # of keys that a resume may change
            "dir": None if "://" in str(workdir) else str(workdir),
            # Capturing what the terminal shows would redraw the live line as text.
            "settings": wandb.Settings(console="off", finish_timeout=FINISH_SECONDS),
        }
        try:
            self._run = wandb.init(**options)
        except Exception as error:  # not logged in, no network: of many kinds
            warn(f"wandb is written offline, for `wandb sync`: {error!r}")
            self._run = wandb.init(**options, mode="offline")
        self._first = max(start, self._run.starting_step)

    def write(self, image: int, numbers: Mapping[str, float]) -> None:
        self._last = image
        self._log({f"repair/{name}": value for name, value in numbers.items()})

    def picture(self, name: str, rgb: RGB, image: int) -> None:
        # Rows of the images before may come later, and a step ahead would drop them.
        self._log({name: self._make_image(rgb, caption=f"after {image} images")})

    def close(self) -> None:
        self._run.finish()

    def _log(self, content: Mapping[str, Any]) -> None:
        if self._last >= self._first:
            self._run.log(dict(content), step=self._last)


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"warning: {' '.join(text.split())}", file=sys.stderr)


def _package(package: str, key: str, extra: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{key} needs {package} ({error}): pip install {package}, or "
            f"'sinder_jax[{extra}]'"
        ) from None


def _run_id(workdir: Any) -> str:
    path = workdir / "wandb_id"
    if path.exists():
        return path.read_text().strip()
    path.write_text(secrets.token_hex(4))
    return path.read_text()
