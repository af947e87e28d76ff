"""Files and folders that appear whole or not at all, on a disk and in a bucket.

path --replacing--> a local path to write to --renamed, or uploaded--> path
path, content --write--> the file
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sinder_jax.storage import paths
from sinder_jax.storage.errors import reason_of
from sinder_jax.storage.paths import StrPath


@contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """Yields a local path to write to; what is there at the end moves to `path`.

    On a disk the local path is beside `path`, where a rename is atomic. For a bucket it
    is in a temporary folder, and every file beside it is uploaded too. After an
    exception nothing is left.

    Args:
      path: a file, replaced if it exists, or a folder that does not exist; on a disk
        its own folder must exist.

    Raises:
      OSError: the file or folder cannot be written; names `path`.
    """
    path = paths.as_path(path)
    if paths.is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, path.name)
            upload(Path(folder), path.parent)
        return
    partial = Path(path).with_name(f".{path.name}.{os.getpid()}.partial")
    remove(partial)  # left by a killed process that had the same number
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        ours = error.filename is None or str(error.filename).startswith(str(partial))
        if error.errno is None or not ours:  # names what is wrong already
            raise
        raise type(error)(f"{path} cannot be written: {reason_of(error)}") from None
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Removes a local file or folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def write(path: StrPath, content: str | bytes) -> None:
    """Writes a file whole or not at all; text as UTF-8.

    Raises:
      OSError: the file cannot be written; names `path`.
    """
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def upload(folder: Path, target: paths.AnyPath) -> None:
    """Copies all files below a local folder to the same names in a bucket."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            place = target / file.relative_to(folder).as_posix()
            with paths.answering(place):
                place.write_bytes(file.read_bytes())
