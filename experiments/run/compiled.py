"""`--compilation-cache=FOLDER`: keeps compiled programs for the next start."""

import os
import stat
from pathlib import Path

import jax


def keep(folder: str) -> None:
    """Makes JAX keep compiled programs in a folder that only this user can write to.

    Programs found there are executed.

    Raises:
      ValueError: the folder is another user's, or others can write to it.
      OSError: it cannot be made.
    """
    path = Path(folder)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"--compilation-cache={folder} holds programs that are run, so it must be "
            "this user's, and nobody else may write to it: chmod go-w, or a new folder"
        )
    jax.config.update("jax_compilation_cache_dir", str(path.absolute()))
