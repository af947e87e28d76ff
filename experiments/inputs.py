"""What a repair reads: photographs and weights, or how to get them.

config.data --> photographs to repair on, others held out
config.checkpoint --> ViTConfig, params (planted, for the demo)
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import convert
from convert import fetch, write
from convert import source as sources
from sinder_jax import checkpoint, data, planted, repair, vit

PLANTED = "planted"
# What must agree with config.model; the rest is how a checkpoint is resampled.
ARCHITECTURE = ("embed_dim", "depth", "ffn_layer", "num_register_tokens")
AT_LEAST_1 = (
    "max_bad_steps",
    "log_every",
    "picture_every",
    "checkpoint_every",
    "measure_images",
)
LARGEST = 2**31 - 1  # positions are counted in int32


def repair_options(config: ConfigDict) -> repair.RepairOptions:
    """The options of the step; `active_blocks=0` in a config means all.

    Raises:
      ValueError: an option or an interval out of range.
    """
    for name, value in config.items():
        least = int(name in AT_LEAST_1)
        if isinstance(value, int) and not least <= value <= LARGEST:
            raise ValueError(
                f"config.{name} must be from {least} to {LARGEST}, got {value}"
            )
    names = [field.name for field in dataclasses.fields(repair.RepairOptions)]
    options = {name: config[name] for name in names}
    return repair.RepairOptions(
        **options | {"active_blocks": config.active_blocks or None}
    )


def photographs(config: ConfigDict) -> tuple[list[Path], list[Path]]:
    """The training list, and the photographs that are not on it.

    Raises:
      ValueError: no data given, or no image there that can be read; says what to give.
      FileNotFoundError: there is no such folder.
    """
    data.check_side("config.image_size", config.image_size)
    if not config.data:
        raise ValueError(
            "no photographs: add --config.data=FOLDER, for example the training set of "
            "ImageNet, or --config.data=sample for those inside scikit-image"
        )
    sample = config.data == "sample"
    files = data.sample_images() if sample else data.list_images(config.data)
    train = data.training_list(files, config.num_images)
    if not any(map(is_readable, train)):  # ends at the first that is
        raise ValueError(
            f"none of the {len(train)} images of {config.data} can be read, the first "
            f"is {train[0]}"
        )
    return train, sorted(set(files) - set(train))


def is_readable(file: Path) -> bool:
    """Whether a file holds an image; decodes it."""
    try:
        data.read_rgb(file)
    except data.UnreadableImage:
        return False
    return True


def check_weights_given(config: ConfigDict) -> None:
    """Refuses a config without weights, before anything is written.

    Raises:
      ValueError: an unknown model, or no checkpoint; says what to fetch and to call.
      FileNotFoundError: the checkpoint does not exist; likewise.
    """
    if config.model == PLANTED:
        if config.checkpoint:
            raise ValueError(
                f"config.model={PLANTED} makes its own weights: name that of "
                f"{config.checkpoint} by --config.model: {', '.join(vit.CONFIGS)}"
            )
        return
    if config.model not in vit.CONFIGS:
        raise ValueError(
            f"config.model={config.model} is unknown; it is {PLANTED} or one of "
            f"{', '.join(vit.CONFIGS)}"
        )
    if not config.checkpoint:
        raise ValueError(f"no weights of {config.model}. {how_to_get(config.model)}")
    if not Path(config.checkpoint).exists():
        raise FileNotFoundError(
            f"{config.checkpoint} does not exist. {how_to_get(config.model)}"
        )


def how_to_get(model: str) -> str:
    """What to fetch for a hub model, and the command that converts it."""
    url = fetch.hub_url(model)
    return (
        f"Fetch {url}, run `python -m convert to-jax {Path(url).name} {model}` and "
        f"add --config.checkpoint={model}"
    )


class Original(NamedTuple):
    """The model that a repair starts from.

    Attributes:
      config: its architecture, resampled as the run's config says.
      params: its params, float32.
      provenance: where its weights come from, see `convert.source.Model`.
    """

    config: vit.ViTConfig
    params: dict[str, Any]
    provenance: dict[str, Any]


def load_model(config: ConfigDict, planted_file: Path) -> Original:
    """The original model.

    Args:
      config: names model and checkpoint, a directory of ours or PyTorch files.
      planted_file: where planted weights are written, in hub layout, and read from.

    Raises:
      ValueError: no checkpoint, a damaged one, or one of another model.
    """
    path = Path(config.checkpoint)
    want = vit.CONFIGS.get(config.model, planted.CONFIG)
    if config.model == PLANTED:
        path = planted_file
        made = planted.planted_model(config.seed)
        state_dict = convert.to_torch(made.config, made.params)
        write.write_state_dict(path, state_dict, overwrite=True)
    model = sources.open_model(path)
    wrong = [
        f"{name} is {getattr(model.config, name)} and not {getattr(want, name)}"
        for name in ARCHITECTURE
        if getattr(model.config, name) != getattr(want, name)
    ]
    if wrong:
        raise ValueError(f"{path} is not {config.model}: {', '.join(wrong)}")
    return Original(
        dataclasses.replace(
            model.config, interpolate_antialias=config.interpolate_antialias
        ),
        checkpoint.unflatten(dict(model.leaves())),
        model.provenance,
    )
