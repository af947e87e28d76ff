"""What a repair reads: photographs and weights, or how to get them.

config.data --photographs--> those to repair on, others held out
config.checkpoint --load_model--> Model (planted, for the demo)
Model --prepare--> model, factors and directions in workdir/frozen
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import convert
from convert import fetch
from convert.commands import lines
from convert.files import writing
from experiments.run import truth
from experiments.run.cluster import Cluster
from experiments.run.progress import duration
from experiments.run.workdir import Workdir
from sinder_jax import cli, defects, factor, families, planted, repair, vit
from sinder_jax import model as models
from sinder_jax.checkpoint import Newest
from sinder_jax.data import batches, decode, listing
from sinder_jax.data.listing import Photograph
from sinder_jax.model import Model
from sinder_jax.storage import original, paths, run_files
from sinder_jax.storage.errors import DamagedError
from sinder_jax.storage.original import Original

PLANTED = "planted"
NAMES = (*vit.CONFIGS, *families.RELATIVES)  # of published models
AUTO = -1  # config.first_block: the diagnosed block
TINY, HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
AT_LEAST = dict.fromkeys(
    (
        "max_bad_steps",
        "log_every",
        "picture_every",
        "checkpoint_every",
        "measure_images",
        "keep_states",
    ),
    1,
) | {"first_block": AUTO}
LARGEST = 2**31 - 1  # positions are counted in int32
# Keys that take memory, threads or hours at once; far above any sensible value.
AT_MOST = {
    "history": 10_000_000,
    "images_per_step": 4096,
    "num_probes": 100_000_000,
    "read_threads": 256,
    "read_workers": 256,
}


def repair_options(config: ConfigDict) -> repair.RepairOptions:
    """Returns the step's options, for `first_block=auto` without the diagnosed block.

    In a config, `active_blocks=0` means all blocks.

    Raises:
      ValueError: an option or an interval out of range.
    """
    for name, value in config.items():
        least, most = AT_LEAST.get(name, 0), AT_MOST.get(name, LARGEST)
        if isinstance(value, int) and not least <= value <= most:
            raise ValueError(
                f"config.{name} must be from {least} to {most}, got {value}"
            )
        if isinstance(value, float) and value and not TINY <= abs(value) <= HUGE:
            raise ValueError(
                f"config.{name} must be 0 or from {TINY:.1e} to {HUGE:.1e} in size, "
                f"which is what float32 holds, got {value}"
            )
    fields = dataclasses.fields(repair.RepairOptions)
    options = {field.name: config[field.name] for field in fields}
    options["active_blocks"] = config.active_blocks or None
    options["first_block"] = _first_block(config)
    return repair.RepairOptions(**options)


def _first_block(config: ConfigDict) -> int:
    """`config.first_block`, 0 for auto; also checks `config.diagnose`."""
    if config.diagnose not in ("on", "off"):
        raise ValueError(f"config.diagnose must be on or off, got {config.diagnose!r}")
    if config.first_block == AUTO and config.diagnose == "off":
        raise ValueError(
            "config.first_block=auto is the diagnosed block: leave config.diagnose=on, "
            "or give a number"
        )
    last = architecture(config).depth - 1
    if config.first_block > last:
        raise ValueError(
            f"config.first_block must be a block from 0 to {last}, or auto, got "
            f"{config.first_block}"
        )
    return max(config.first_block, 0)


def photographs(
    config: ConfigDict, say: Callable[[str], None] = print
) -> tuple[list[Photograph], list[Photograph]]:
    """Returns the training list and the photographs that are not on it.

    Args:
      config: says where they are and how many to use.
      say: called with one line about what is left out, and if there are fewer.

    Raises:
      ValueError: no data given, no readable image, an image size that is not a multiple
        of the patch size, or an impossible `config.resize`; says what to give.
      FileNotFoundError: no such folder, list or dataset.
    """
    patch_size = architecture(config).patch_size
    decode.check_side("config.image_size", config.image_size, patch_size)
    check_resize(config)
    if not config.data:
        raise ValueError(
            "no photographs: add --config.data=FOLDER, for example the training set of "
            "ImageNet, or --config.data=sample for those inside scikit-image"
        )
    found = listing.open_photographs(config.data, say)
    train = batches.training_list(
        found, config.num_images, shuffle_seed=config.shuffle_seed
    )
    if not any(map(is_readable, train)):  # stops at the first readable one
        raise ValueError(
            f"none of the {len(train)} images of {config.data} can be read, the first "
            f"is {train[0].name}"
        )
    if len(found) < config.num_images:
        say(
            f"only {len(found)} photographs in {config.data}, {config.num_images} "
            "asked for: all are used, over and over"
        )
    names = {photograph.name for photograph in train}  # a list may repeat one
    rest = batches.held_out(found, config.num_images)
    return train, [photograph for photograph in rest if photograph.name not in names]


def varied(config: ConfigDict) -> Iterator[Photograph]:
    """Readable photographs to plant a defect on, each of them once and whole.

    Those to repair on and others in turn: by the former alone, or by crops, a defect
    would be uneven on the rest. Errors as `photographs`.
    """
    both = itertools.zip_longest(*photographs(config, say=lambda line: None))
    whole = dict.fromkeys(listing.whole(x) for x in itertools.chain(*both) if x)
    return filter(is_readable, whole)


def check_resize(config: ConfigDict) -> None:
    """Refuses an unknown `config.resize`, or one that needs single-image steps.

    Raises:
      ValueError: says what to give.
    """
    if config.resize == "keep" and config.images_per_step != 1:
        raise ValueError(
            "config.resize=keep gives images of several shapes, so that a step takes "
            "one: add --config.images_per_step=1"
        )
    batches.check_resize(config.resize, 1)


def is_readable(
    photograph: Photograph, say: Callable[[str], Any] = lambda line: None
) -> bool:
    """True if a photograph can be read and decoded; does both, and says why not."""
    try:
        photograph.read()
    except decode.UnreadableImage as error:
        say(f"skipped, unreadable: {error}")
        return False
    return True


def resumes(workdir: str) -> bool:
    """True if a workdir holds the model of a run, which goes on with that model."""
    path = paths.as_path(workdir)
    with paths.answering(path):
        return (path / run_files.FROZEN).exists()


def check_weights_given(config: ConfigDict, *, resumes: bool = False) -> None:
    """Refuses a config without weights, before anything is written.

    Args:
      config: the run's config.
      resumes: True if the workdir holds the model, which `first_start.check_weights`
        compares.

    Raises:
      ValueError: an unknown model, no checkpoint, or a planted model's seed below 0;
        says what to give, or to fetch and to run.
      FileNotFoundError: the checkpoint does not exist; says the same.
    """
    if config.model == PLANTED:
        if config.checkpoint:
            raise ValueError(
                f"config.model={PLANTED} makes its own weights; give the model of "
                f"{config.checkpoint} by --config.model: {', '.join(NAMES)}"
            )
        if config.seed < 0:
            raise ValueError(f"config.seed: got {config.seed}, expected 0 or above")
        return
    if config.model not in NAMES:
        raise ValueError(
            f"config.model={config.model} is unknown; it is {PLANTED} or one of "
            f"{', '.join(NAMES)}"
        )
    if not config.checkpoint:
        if resumes:
            return
        raise ValueError(f"no weights of {config.model}; {how_to_get(config.model)}")
    path = paths.as_path(config.checkpoint)
    if paths.is_remote(path) and path.suffix in (".pth", ".safetensors"):
        raise ValueError(
            f"config.checkpoint={path}: PyTorch files are read from a disk; convert it "
            "there (`python -m convert to-jax`) and copy the directory to the bucket"
        )
    if not (resumes or path.exists()):
        raise FileNotFoundError(
            f"{config.checkpoint} does not exist; {how_to_get(config.model)}"
        )


def check_plant(config: ConfigDict) -> None:
    """Refuses a `config.plant` that cannot be planted.

    Raises:
      ValueError: no block of the model, or a model that has a planted defect.
    """
    if not config.plant:
        return
    truth.block(config, architecture(config).depth)
    if config.model == PLANTED:
        raise ValueError(
            f"config.plant={config.plant} needs a trained model, and "
            f"config.model={PLANTED} has a defect of its own: give --config.model "
            "and --config.checkpoint"
        )


def architecture(config: ConfigDict) -> vit.ViTConfig:
    """Architecture of `config.model`, a published model or the planted one."""
    if config.model in families.RELATIVES:
        return vit.ViTConfig(**families.RELATIVES[config.model].fields)
    return vit.CONFIGS.get(config.model, planted.CONFIG)


def how_to_get(model: str) -> str:
    """What to fetch for a published model, and the command that converts it."""
    if model in families.RELATIVES:
        return (
            "fetch its files from its publisher, run `python -m convert to-jax FILES "
            f"{model}` and add --config.checkpoint={model}"
        )
    url = fetch.hub_url(model)
    return (
        f"fetch {url}, run `python -m convert to-jax {Path(url).name} {model}` and "
        f"add --config.checkpoint={model}"
    )


def load_model(config: ConfigDict, planted_file: Path = Path()) -> Model:
    """Opens the model to repair; resamples as the run's config says, if it does.

    Args:
      config: names the model and its weights: a checkpoint directory, also in a bucket,
        or PyTorch files.
      planted_file: where a planted model is written, and read like any other.

    Raises:
      ValueError: no checkpoint, a damaged one, or one of another model.
    """
    path = paths.as_path(config.checkpoint)
    if config.model == PLANTED:
        path = planted_file
        write_planted(path, planted.planted_model(config.seed))
    model = convert.open_model(path)
    for note in lines.untold_statistics(model):
        cli.warn(f"{path}: {note}")
    # Another stored grid is resampled; what no name tells is the model's own.
    own = {name: getattr(families.of(model.config), name) for name in vit.OWN}
    named = dataclasses.replace(architecture(config), **own)
    wrong = models.differences(model.config, named, grid=False)
    if wrong:
        raise ValueError(f"{path} is not {config.model}: they differ in {wrong}")
    return resampled(model, config) if "interpolate_antialias" in config else model


def write_planted(path: Path, made: planted.PlantedModel) -> None:
    """Writes a planted model in the hub's layout, to be read like any other."""
    state_dict = convert.to_torch(made.config, made.params)
    writing.write_state_dict(path, state_dict, overwrite=True)


def resampled(model: Model, config: ConfigDict) -> Model:
    """The model, resampling its position embedding as the run's config says."""
    antialias = config.interpolate_antialias
    changed = dataclasses.replace(model.config, interpolate_antialias=antialias)
    return dataclasses.replace(model, config=changed)


class Weights:
    """The model to repair: each part is read or computed when it is first asked for.

    Only process 0 asks.

    Args:
      config: of the run.
      workdir: where the parts are stored once `prepare` was called.
      newest: the state that the run goes on from, if any.
      show_phase: called with the name of each phase.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Workdir,
        newest: Newest | None,
        show_phase: Callable[[str], None],
    ):
        self.config, self.workdir = config, workdir
        self.newest, self.show_phase = newest, show_phase

    @functools.cached_property
    def stored(self) -> Original | None:
        """What `prepare` stored, see `stored_original`."""
        return stored_original(self.workdir, self.newest)

    @property
    def have_begun(self) -> bool:
        """True if a start before this one has begun to repair."""
        return self.newest is not None or self.stored is not None

    @functools.cached_property
    def model(self) -> Model:
        """The model before the repair, see `load_model`."""
        if self.stored is not None:
            return self.stored.model
        with self.workdir.output("planted.safetensors") as path:
            model = load_model(self.config, path)
            if self.config.plant:
                model = self._with_defect(model, path)
            _ = model.params  # before the file is moved to its place
        vit.patch_grid(model.config, self.config.image_size, self.config.image_size)
        return model

    def _with_defect(self, model: Model, path: Path) -> Model:
        self.show_phase("planting a defect")
        chosen = list(itertools.islice(varied(self.config), truth.PLANTED_ON))
        write_planted(path, truth.plant(self.config, model, chosen, path))
        return resampled(convert.open_model(path), self.config)

    @functools.cached_property
    def found(self) -> defects.SingularDefects:
        """Its directions, by the method of the config."""
        config, model = self.config, self.model
        self.show_phase("directions")
        print(f"directions of {model.config.depth} blocks, {config.method}", flush=True)
        return defects.singular_defects(
            model.config,
            model.params,
            config.method,
            key=jax.random.key(config.seed),
            num_probes=config.num_probes,
        )


def original_of_all(processes: Cluster, weights: Weights) -> Original:
    """Loads model, factors and directions, made by process 0 where there are none yet.

    Args:
      processes: of the run.
      weights: the model to repair.

    Raises:
      ValueError: as `stored_original` and `load_model`, or the state belongs to other
        factors.
    """
    found = weights.stored if processes.is_first else None
    processes.barrier()  # a damaged one is out of the way
    if processes.is_first and found is None:
        prepare(weights)
    frozen, newest = weights.workdir.frozen, weights.newest
    while not frozen.exists():  # not in a collective, which may time out
        time.sleep(1.0)
    processes.barrier()
    weights.show_phase("loading")
    found = found or original.load(frozen)
    if newest is not None:
        original.check_basis(frozen, found, newest.metadata)
    return found


def stored_original(workdir: Workdir, newest: Newest | None) -> Original | None:
    """Loads what `prepare` stored; None if it is to be made, anew or again.

    A damaged one is set aside.

    Args:
      workdir: where it is stored.
      newest: the state that the run goes on from, if any.

    Raises:
      ValueError: it is whole, but of another version of the format.
    """
    path = workdir.frozen
    try:
        return original.load(path)
    except (FileNotFoundError, ValueError) as error:
        unfit = isinstance(error, ValueError) and not isinstance(error, DamagedError)
        if unfit and (path / "metadata").exists():
            raise  # whole, but another version's
        reason = str(error)
    if path.exists():
        aside = path.with_name(f"{path.name}.damaged")
        workdir.check()
        paths.remove(aside)
        path.rename(aside)
        cli.warn(f"{reason}; it is set aside as {aside.name} and made again")
    elif newest is not None:
        cli.warn(f"{reason}; it is made again")
    return None


def prepare(weights: Weights) -> None:
    """Computes factors and stores them with model and directions.

    Every start and every process of the run reads the stored ones: ε belongs to that
    basis.
    """
    model, found, workdir = weights.model, weights.found, weights.workdir
    began = time.monotonic()
    weights.show_phase("singular values")
    print(f"singular values of {4 * model.config.depth} kernels", flush=True)
    factors = factor.factorize(model.config, model.params)
    print(f"they took {duration(time.monotonic() - began)}", flush=True)
    weights.show_phase("storing the original model")
    directions = found.directions.astype(np.float32)
    with workdir.checkpoint(workdir.frozen.name) as place:
        original.save(place, Original(model, factors, directions), found.gaps.tolist())
