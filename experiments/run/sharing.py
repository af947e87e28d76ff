"""Whether the workdir of several processes is one folder.

    process 0 --writes a file--> workdir --the others look for it--> all go on, or none

On machines without a common disk each would otherwise find an empty folder of its own.
"""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from sinder_jax.storage.paths import AnyPath

WITHIN = 20.0  # seconds; network disks show a new file that late


def check(
    folder: AnyPath,
    *,
    process: int,
    broadcast: Callable[[int], int],
    gather: Callable[[bool], Sequence[bool]],
    within: float = WITHIN,
) -> None:
    """Refuses a workdir that is another folder for another process; called by all.

    Args:
      folder: the workdir, as this process was told.
      process: number of this one; 0 is the one that writes.
      broadcast: gives each process the number that process 0 passed.
      gather: gives each process what all passed, in their order.
      within: seconds to look for.

    Raises:
      ValueError: on all processes, if one of them does not see it.
    """
    token = random.SystemRandom().getrandbits(30)
    if process == 0:
        try:
            _file(folder, token).write_text("")
        except OSError:
            token = -1  # nobody can see it, and nobody waits for this process
    token = broadcast(token)
    seen = gather(token >= 0 and _appears(_file(folder, token), within))
    if process == 0 and token >= 0:
        _file(folder, token).unlink()
    blind = [str(number) for number, saw in enumerate(seen) if not saw]
    if blind:
        raise ValueError(
            f"--workdir={folder} is not one folder for all {len(seen)} processes: "
            f"{', '.join(blind)} cannot see what 0 writes there. Put it on a disk that "
            "all of them share, or into a bucket (gs://)."
        )


def _file(folder: AnyPath, token: int) -> AnyPath:
    return folder / f".shared.{token}"


def _appears(file: AnyPath, within: float) -> bool:
    until = time.monotonic() + within
    while True:
        with suppress(OSError):
            # Listed, not asked for: a disk may remember that it was not there.
            if file.name in {path.name for path in file.parent.iterdir()}:
                return True
        if time.monotonic() >= until:
            return False
        time.sleep(min(0.5, within / 10))
