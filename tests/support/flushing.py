"""What a process flushes to the disk, and what it renames, in order."""

import os
from pathlib import Path

import pytest
from etils.epath import gpath


class Log(list):
    """Pairs of "flushed" or "appeared" and a path, in order."""

    def assert_flushed_before(self, path: Path) -> None:
        """All that `path` holds was flushed, then it appeared, then its own folder."""
        partial, appeared = self._appearance(path)
        flushed = {each for what, each in self[:appeared] if what == "flushed"}
        for below in (path, *path.rglob("*")):
            if below.name not in ("commit_success.txt", "_CHECKPOINT_METADATA"):
                assert partial / below.relative_to(path) in flushed, below
        assert ("flushed", path.parent) in self[appeared:], path

    def _appearance(self, path: Path) -> tuple[Path, int]:
        (found,) = (
            (each[0], i)
            for i, (what, each) in enumerate(self)
            if what == "appeared" and each[1] == path
        )
        return found


def watch(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Logs all flushes and renames of this process from now on."""
    log = Log()
    fsync, replace, rename = os.fsync, os.replace, gpath.PosixGPath.rename

    def logged_fsync(entry: int) -> None:
        fsync(entry)
        log.append(("flushed", Path(os.readlink(f"/proc/self/fd/{entry}"))))

    def logged_replace(source, target) -> None:
        replace(source, target)
        log.append(("appeared", (Path(source), Path(target))))

    def logged_rename(source, target):  # Orbax's
        done = rename(source, target)
        log.append(("appeared", (Path(source), Path(target))))
        return done

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    monkeypatch.setattr(gpath.PosixGPath, "rename", logged_rename)
    return log
