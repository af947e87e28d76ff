"""Checks that the workdir of several processes is one shared folder.

    process 0 --writes a file--> workdir --the others look for it--> all go on, or none

Without a shared disk each machine would otherwise find an empty folder of its own.
"""

import random
import time
from contextlib import suppress

import numpy as np

from experiments.run.cluster import Cluster
from sinder_jax.storage.paths import AnyPath

WITHIN = 20.0  # seconds; network disks may show a new file so late


def check(folder: AnyPath, cluster: Cluster, *, within: float = WITHIN) -> None:
    """Refuses a workdir that is not the same folder for all; called by every process.

    Args:
      folder: the workdir, as this process was told.
      cluster: the processes.
      within: seconds to look for the file of process 0.

    Raises:
      ValueError: in all processes, if one of them cannot see that file.
    """
    token = random.SystemRandom().getrandbits(30)
    if cluster.is_first:
        try:
            _file(folder, token).write_text("")
        except OSError:
            token = -1  # nobody can see the file, and nobody waits for it
    token = int(cluster.from_first(np.array(token)))
    seen = cluster.gather(token >= 0 and _appears(_file(folder, token), within))
    if cluster.is_first and token >= 0:
        _file(folder, token).unlink()
    blind = [str(number) for number, saw in enumerate(seen) if not saw]
    if blind:
        raise ValueError(
            f"--workdir={folder} is not one folder for all {len(seen)} processes: "
            f"{', '.join(blind)} cannot see what 0 writes there. Put it on a disk that "
            "all of them share, or into a bucket (gs://)"
        )


def _file(folder: AnyPath, token: int) -> AnyPath:
    return folder / f".shared.{token}"


def _appears(file: AnyPath, within: float) -> bool:
    deadline = time.monotonic() + within
    while True:
        with suppress(OSError):
            # Listed, not opened: a network disk may remember that it did not exist.
            if file.name in {path.name for path in file.parent.iterdir()}:
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(0.5, within / 10))
