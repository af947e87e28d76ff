"""What a run was first started with, to which every later start is compared.

    config, photographs, weights --settle--> config.json, photographs.json, the digest
                                             of the weights in frozen/; or a refusal

ε belongs to the weights, and image k of a run is photograph k of one list: with others
a resumed run would give another result without a word.
"""

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

import convert
from experiments.run.cluster import Cluster
from experiments.run.workdir import Workdir
from sinder_jax import checkpoint, cli, families, vit
from sinder_jax.data.listing import Photograph
from sinder_jax.storage import original, paths, run_files
from sinder_jax.storage.errors import DamagedError
from sinder_jax.storage.paths import AnyPath
from sinder_jax.storage.run_files import Photographs

# Keys that may change when a run is resumed: they do not affect the result.
FREE_KEYS = (
    "checkpoint",
    "checkpoint_every",
    "diagnose",
    "keep_every",
    "keep_states",
    "log_every",
    "max_bad_steps",
    "picture_every",
    "read_threads",
    "read_workers",
    "split_model",
    "tensorboard",
    "wandb_project",
)
# Keys that made the stored model, factors and directions: even --force holds them.
FROZEN_KEYS = ("model", "method", "num_probes", "seed", "interpolate_antialias")

KIND = "repair"  # key of a config of another repair than SINDER's


def settle(
    processes: Cluster,
    workdir: Workdir,
    config: ConfigDict,
    train: Sequence[Photograph],
    *,
    force: bool = False,
) -> None:
    """Holds all processes of a start to each other, and the start to the first one.

    Args:
      processes: of the run.
      workdir: of the run; must be the same folder for all of them.
      config: sets its `images_per_step`; by default one for each device.
      train: the training list.
      force: as for `settle_config` and `settle_photographs`.

    Raises:
      ValueError: as these and `check_weights`, or the processes differ.
    """
    processes.check_same("configs", config.to_json(sort_keys=True))
    processes.check_same("photographs", "\n".join(photo.name for photo in train))
    processes.check_shared(workdir.path)

    def in_first() -> None:
        check_weights(workdir, config)
        settle_config(workdir, config, jax.device_count(), force=force)
        settle_photographs(workdir, stamps(train), force=force)

    processes.in_first(in_first)
    per_step = int(processes.from_first(np.array(config.images_per_step)))
    if not processes.is_first:
        settle_config(workdir, config, per_step, force=force)


def check_weights(workdir: Workdir, config: ConfigDict) -> None:
    """Refuses to resume with other weights than those that the run started from.

    A run goes on with the model in its workdir. So the checkpoint may have been moved,
    or be gone; only one that holds other weights is refused.

    Raises:
      ValueError: other weights; names both paths and digests.
      FileNotFoundError: the checkpoint does not exist, nor was it the first one.
    """
    if not (config.checkpoint and workdir.frozen.exists()):
        return
    first = stored_config(workdir)
    if first.get("model") != config.model:  # `settle_config` says so
        return
    path, before = paths.as_path(config.checkpoint), first.get("checkpoint")
    if not path.exists() and config.checkpoint == before:
        cli.warn(f"{path} is gone: resuming with the model stored in {workdir.frozen}")
        return
    try:
        known_config, known = original.describe_model(workdir.frozen)
    except DamagedError:
        return  # `inputs.prepare` makes it again, and compares
    given = convert.open_model(path)
    found = given.digest
    now = _function(given.config)
    for name, value in _function(known_config).items():
        if found == known and now[name] != value:
            raise ValueError(
                f"{workdir.path} holds a run of {before} with {name} {value}, now "
                f"{path} with {now[name]}; choose another --workdir, or "
                "--config.checkpoint= to resume with the model stored in the workdir"
            )
    if found != known:
        raise ValueError(
            f"{workdir.path} holds a run that started from other weights: {before} "
            f"with digest {known[:12]}, now {path} with digest {found[:12]}; choose "
            "another --workdir, or give the weights of the first start, or "
            "--config.checkpoint= to resume with the model stored in the workdir"
        )


def _function(config: vit.ViTConfig) -> dict[str, Any]:
    """What no tensor tells of a model's function, by name."""
    own = {name: getattr(families.of(config), name) for name in vit.OWN}
    return {"num_heads": config.num_heads, **own}


def settle_config(
    workdir: Workdir, config: ConfigDict, images_per_step: int, *, force: bool = False
) -> None:
    """Stores the config, or compares it with the stored one of the first start.

    Args:
      workdir: of the run.
      config: an `images_per_step` of 0 is replaced by the stored number or, at the
        first start, by the argument.
      images_per_step: for the first start.
      force: resume with a config that changes the result, but for `FROZEN_KEYS`. Keeps
        the previous config as config.json.before_1 and so on.

    Raises:
      ValueError: keys that change the result differ; names them.
    """
    path = workdir.path / run_files.CONFIG
    first = is_first(workdir)
    stored = {} if first else stored_config(workdir)
    per_step = images_per_step if first else stored.get("images_per_step", 0)
    config.images_per_step = config.images_per_step or per_step
    differences = {} if first else changes(stored, config)
    changed = "; ".join(differences.values())
    held = [key for key in differences if key in (*FROZEN_KEYS, KIND)]
    if changed and not (force and not held):
        forced = "" if held else ", or --force to resume with the new one"
        raise ValueError(
            f"{workdir.path} holds a run with another config: {changed}; choose "
            f"another --workdir, or use the config of the first start{forced}"
        )
    if workdir.writes and changed:
        _keep(workdir, path, f"with another config: {changed}")
    if workdir.writes and (first or changed):
        workdir.write_json(path.name, config.to_dict())
    workdir.config = config.to_dict()


def changes(stored: Mapping[str, Any], config: ConfigDict) -> dict[str, str]:
    """What changes the result and is not as at the first start, in words, by key."""
    was, now = (each.get(KIND, "sinder") for each in (stored, config))
    if was != now:  # with other keys, all of which would be named
        return {KIND: f"{KIND} was {was!r} and is {now!r}"}
    return {
        key: f"{key} was {stored.get(key)!r} and is {value!r}"
        for key, value in config.items()
        if stored.get(key) != value and key not in FREE_KEYS
    }


def is_first(workdir: Workdir) -> bool:
    """True if nothing was computed yet, with another config or other photographs."""
    made = workdir.frozen.exists() or workdir.summary.exists()
    return not made and not run_files.numbered(workdir.states)


def stored_config(workdir: Workdir) -> dict[str, Any]:
    """The config of the first start; if its file is damaged, from a state.

    Raises:
      ValueError: there is no state either.
    """
    path = workdir.path / run_files.CONFIG
    try:
        return run_files.read_json(path)
    except (FileNotFoundError, ValueError) as error:
        lost = isinstance(error, FileNotFoundError)
        reason = f"{path} is missing" if lost else str(error)
        newest = checkpoint.load_newest(workdir.states)
        if newest is None:
            raise ValueError(
                f"{reason} and no state holds what it said: put it back from a "
                "copy, or choose another --workdir"
            ) from None
        cli.warn(f"{reason}; it is written again from state {newest.path.name}")
        if workdir.writes:
            workdir.write_json(path.name, newest.metadata["config"])
        return newest.metadata["config"]


def settle_photographs(
    workdir: Workdir,
    photographs: Photographs,
    *,
    force: bool = False,
) -> None:
    """Stores the training list, or compares it with that of the first start.

    Image k of a run is photograph k modulo their number, so another list changes
    every image from now on. A file that was replaced under its name is only told.

    Args:
      workdir: of the run.
      photographs: name and stamp of each, see `stamps`.
      force: resume with another list. Keeps the one before as
        photographs.json.before_1 and so on.

    Raises:
      ValueError: another list, or the stored one is damaged; names the first
        difference.
    """
    path = workdir.path / run_files.PHOTOGRAPHS
    first = is_first(workdir)
    if not (first or path.exists()):
        cli.warn(f"{path} is missing: the photographs may be others than before")
    elif not first:
        listed, told = _changes(run_files.read_photographs(path), photographs)
        if not told:
            return
        if listed and not force:
            raise ValueError(
                f"{workdir.path} holds a run with {told}; choose another --workdir, "
                "or give the photographs of the first start, or --force to resume "
                "with these"
            )
        _keep(workdir, path, f"with {told}")
    workdir.write(path.name, run_files.photographs_text(photographs))


def _keep(workdir: Workdir, path: AnyPath, told: str) -> None:
    """Keeps a file of the start before under another name, and warns."""
    number = 1
    while (before := path.with_name(f"{path.name}.before_{number}")).exists():
        number += 1
    workdir.write(before.name, path.read_text())
    cli.warn(f"{workdir.path} goes on {told}; the previous one is {before.name}")


class Stamped(Protocol):
    """What has a name, and a `stamp` that changes with its files."""

    @property
    def name(self) -> str:
        """For people."""

    def stamp(self) -> Any:
        """Such as sizes and times of files; JSON values."""


def stamps(train: Sequence[Stamped]) -> run_files.Photographs:
    """Name of each photograph of a list, and its `stamp`."""
    with ThreadPoolExecutor(16) as pool:  # a network disk answers one after the other
        return [
            (photograph.name, stamp)
            for photograph, stamp in zip(
                train, pool.map(lambda each: each.stamp(), train), strict=True
            )
        ]


def _changes(before: Photographs, now: Photographs) -> tuple[bool, str]:
    """If two training lists differ, and in what; empty if not even a file does."""
    pairs = itertools.zip_longest(before, now, fillvalue=("none", None))
    different = [(k, was, new) for k, (was, new) in enumerate(pairs) if was != new]
    for image, (was, _), (new, _) in different:
        if was != new:
            return True, (
                f"other photographs: {len(before)} then, {len(now)} now (the first "
                f"that differs: image {image} was {was} and is {new})"
            )
    if not different:
        return False, ""
    first = different[0][1][0]
    return False, (
        f"{len(different)} of {len(now)} photographs replaced under their names, by "
        f"files of other sizes or times (the first is {first})"
    )
