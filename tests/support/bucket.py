"""A bucket for tests: gs://bucket/... kept in a folder, with a bucket's manners.

Objects only: a directory is what objects' names have in common, making one does
nothing, and an object appears when it is closed. Renaming copies one object after the
other. `stop_after` ends all writing and removing after so many objects, as a kill does.

What is replaced: the file system of gs:// (gcsfs), also for etils.epath, and where
Orbax sends TensorStore. All between is the real code.
"""

import contextlib
import importlib.machinery
import io
import shutil
import sys
import types
from pathlib import Path

import fsspec
from etils.epath import backend, gpath
from orbax.checkpoint._src.path import gcs_utils


class Killed(BaseException):
    """In place of a signal."""


class _Object(io.BytesIO):
    def __init__(self, bucket, path):
        super().__init__()
        self._bucket, self._path = bucket, path

    def close(self):
        if self.closed:
            return
        data = self.getvalue()
        super().close()  # first: what a kill ends is not closed again later
        self._bucket.put_object(self._path, data)


class Bucket(fsspec.AbstractFileSystem):
    protocol = ("gs", "gcs")
    cachable = False

    def __init__(self, root: Path):
        super().__init__()
        self.root, self.left = root, None

    def stop_after(self, objects: int | None) -> None:
        self.left = objects

    def place(self, path) -> Path:
        return self.root / self._strip_protocol(str(path)).strip("/")

    def objects(self, path="") -> list[str]:
        """The names of all objects below a path."""
        top = self.place(path)
        return sorted(
            str(file.relative_to(self.root))
            for file in top.rglob("*")
            if file.is_file() and not file.name.endswith(".__lock")
        )

    def _count(self, objects):
        if self.left is not None:
            if self.left <= 0:
                raise Killed
            self.left -= objects

    def put_object(self, path, data: bytes) -> None:
        self._count(1)
        place = self.place(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        if mode == "create":  # the bucket decides at once, as a disk does
            self._count(0)
            self.place(path).parent.mkdir(parents=True, exist_ok=True)
            self.place(path).open("xb").close()
        self.put_object(path, value)

    def info(self, path, **kwargs):
        name, place = self._strip_protocol(str(path)), self.place(path)
        if place.is_file():
            return {"name": name, "size": place.stat().st_size, "type": "file"}
        if self.objects(path):
            return {"name": name, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **kwargs):
        info = self.info(path)
        if info["type"] == "file":
            return [info] if detail else [info["name"]]
        found = [
            self.info(f"{info['name']}/{child.name}")
            for child in sorted(self.place(path).iterdir())
            if child.is_file() or any(file.is_file() for file in child.rglob("*"))
        ]
        return found if detail else [each["name"] for each in found]

    def _open(self, path, mode="rb", **kwargs):
        if mode == "rb":
            return io.BytesIO(self.place(path).read_bytes())
        assert mode == "wb", f"a bucket's objects cannot be opened with {mode}"
        return _Object(self, path)

    def cp_file(self, path1, path2, **kwargs):
        with contextlib.suppress(IsADirectoryError):
            self.put_object(path2, self.place(path1).read_bytes())

    def _rm(self, path):
        self._count(0)
        place = self.place(path)
        if place.is_file():
            place.unlink()
        elif not self.objects(path):
            shutil.rmtree(place, ignore_errors=True)

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rmdir(self, path):
        pass


def install(monkeypatch, root: Path) -> Bucket:
    """Makes gs:// lead into a folder."""
    made = Bucket(root)
    module = types.ModuleType("gcsfs")
    module.__spec__ = importlib.machinery.ModuleSpec("gcsfs", None)
    monkeypatch.setitem(sys.modules, "gcsfs", module)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: made)
    monkeypatch.setattr(fsspec, "filesystem", lambda protocol: made)

    def kvstore(path):
        return {"driver": "file", "path": str(made.place(path))}

    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", kvstore)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda _: False)
    return made
