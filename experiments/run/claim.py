"""The right to write to a workdir: numbered claims, of which the highest one counts.

    a start --Claim--> WORKDIR/claims/00000007, which only one process can make
    a file --output--> WORKDIR/claims/00000007.partial/ --check--> its place

A run that was suspended, or whose disk hung, may have lost its workdir: after 30 s
without a sign of life another run takes it over by a higher claim. When the first one
wakes up, anywhere in its code, it must not write any more. So a file is written in a
folder of the claim, and moved to its place after `check`. Before the next owner writes
anything, it puts a file in place of that folder and removes the earlier claim: from
then on all that the earlier run writes or moves there fails, and so does `check`.
Everything else (lines added to metrics.jsonl, event files, traces, removed states, the
objects of a bucket) follows a check. What remains possible is one such write, by a run
that was suspended between the check and the write.
"""

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments.run import alive
from sinder_jax.storage import files, paths, run_files
from sinder_jax.storage.paths import AnyPath

# Seconds between two looks into a bucket. A run is not taken over so soon after it
# wrote a sign of life.
EVERY = 5.0
READS = 5  # a claim appears empty, and is complete a moment later
FACTS = {"host", "pid", "process", "started", "time", "claim", "phase"}
ENDED = "stopped"  # the phase of a claim that was given up


class LostError(OSError):
    """Another run has taken the workdir over: nothing more may be written."""


class Claim:
    """The claim of this process to a workdir.

    Nothing is changed before the first `check`; a claim that is released without one
    leaves no trace.

    Args:
      workdir: a folder of a disk, which exists, or of a bucket.

    Raises:
      ValueError: another run is alive in the workdir, or started at the same moment.
      OSError: the workdir cannot be written to.
    """

    def __init__(self, workdir: AnyPath):
        self._workdir, self._folder = workdir, workdir / run_files.CLAIMS
        self._lock = threading.Lock()
        self._lost, self._used, self._checked = "", False, 0.0
        self._released = False
        self._folder.mkdir(exist_ok=True)
        newest = max(self._numbers(), default=0)
        alive.refuse_if_alive(workdir, self._owner(newest))
        self.number = newest + 1
        self._facts = alive.this_process()
        self._facts |= {"claim": self.number, "phase": "starting"}
        try:
            files.create(self._path(self.number), json.dumps(self._facts) + "\n")
        except FileExistsError:
            other = self._owner(self.number)
            if other != self._facts:  # else a request that had succeeded was repeated
                raise ValueError(
                    f"another run was started in {workdir} at the same moment: "
                    f"{_named(other)}; stop it, or choose another --workdir"
                ) from None

    @property
    def staging(self) -> Path | None:
        """Where files are written before they move to their place; None in a bucket."""
        if paths.is_remote(self._folder):
            return None
        return Path(self._folder / f"{self.number:08d}.partial").absolute()

    def check(self) -> None:
        """Makes sure that the workdir is still this run's; call before every write.

        The first call shuts earlier runs out.

        Raises:
          LostError: another run has taken the workdir over.
        """
        with self._lock:
            if self._lost:
                raise LostError(self._lost)
            if self._released:
                return
            seconds = abs(time.time() - self._checked)
            if paths.is_remote(self._folder) and seconds < EVERY:
                return
            if self._is_gone():
                owner = self._owner(max(self._numbers(), default=0))
                self._lost = (
                    f"this run lost {self._workdir} to {_named(owner)}: "
                    "nothing more is written here"
                )
                raise LostError(self._lost)
            if not self._used:
                self._shut_out()
            self._used, self._checked = True, time.time()

    @contextmanager
    def output(self, name: str) -> Iterator[Path]:
        """Yields a local path to write to, for `name` in the workdir.

        At the end of the block the file or folder moves there, with all files that were
        written beside it.

        Raises:
          LostError: as `check`.
          OSError: it cannot be written; names the place in the workdir.
        """
        self.check()
        target, staging = self._workdir / name, self.staging
        try:
            if staging is not None:
                staging.mkdir(exist_ok=True)
                target.parent.mkdir(exist_ok=True)
            with files.replacing(target, staging, self.check) as local:
                yield local
        except OSError:
            self.check()  # if the workdir was lost, that is the reason
            raise

    def write(self, name: str, content: str) -> None:
        """Writes a small file of the workdir, whole or not at all; as `output`."""
        with self.output(name) as path:
            path.write_bytes(files.encoded(content))

    def release(self) -> None:
        """Gives the workdir up: the next start need not find out if this run is alive.

        A failure is ignored: the next start then has to find out.
        """
        with suppress(OSError):
            path, staging = self._path(self.number), self.staging
            if self._used:
                content = json.dumps(self._facts | {"phase": ENDED}) + "\n"
                self.write(f"{run_files.CLAIMS}/{path.name}", content)
            elif not self._lost:
                path.unlink(missing_ok=True)
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
                if not self._used:
                    staging.parent.rmdir()  # if it is empty
        self._released = True

    def _is_gone(self) -> bool:
        """True if the next owner has removed this claim, but not the whole folder.

        The claim is opened: NFS may answer anything else from what it knew before.
        """
        try:
            with paths.answering(self._folder):
                self._path(self.number).read_bytes()
        except FileNotFoundError:
            return self._folder.is_dir()
        return False

    def _path(self, number: int) -> AnyPath:
        return self._folder / f"{number:08d}"

    def _numbers(self) -> set[int]:
        """Numbers of all claims, also of those of which only the shut-out is left."""
        stems = (name.partition(".")[0] for name in paths.names(self._folder))
        return {int(stem) for stem in stems if stem.isdigit()}

    def _owner(self, number: int) -> dict[str, Any] | None:
        """What a claim says of its run; None if it is gone or damaged."""
        for _ in range(READS if number else 0):
            try:
                facts = run_files.read_json(self._path(number))
                return facts if facts.keys() >= FACTS else None
            except FileNotFoundError:
                return None
            except (OSError, ValueError):
                time.sleep(0.1)
        return None

    def _shut_out(self) -> None:
        """Removes earlier claims, and what their runs, if alive, could still write."""
        for number in filter(self.number.__gt__, self._numbers()):
            owner, staging = self._owner(number), self.staging
            if staging is not None and not (owner and owner["phase"] == ENDED):
                _shut(staging.with_name(f"{number:08d}.partial"), staging)
            self._path(number).unlink(missing_ok=True)


def _shut(folder: Path, aside: Path) -> None:
    """Replaces a folder, if there is one, by a file."""
    while not folder.is_file():
        if folder.exists():
            aside.mkdir(exist_ok=True)
            moved = tempfile.mkdtemp(dir=aside)
            os.rename(folder, moved)
            shutil.rmtree(moved, ignore_errors=True)
        with suppress(FileExistsError):  # the folder is back: once more
            folder.touch(exist_ok=False)


def _named(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["started"]))
    return f"{owner['host']} pid {owner['pid']}, started {started}"
