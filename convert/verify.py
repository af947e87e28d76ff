"""Does a converted model compute what the file's PyTorch model computes?

    packaged photograph --JAX model on the params------------> tokens [1, T, D]
                        `-PyTorch on the tensors of the file--> tokens [1, T, D]
    both --measure--> Comparison --check--> ValueError, unless they agree

One photograph at the size of the stored grid: there no position embedding is resampled,
so all layouts mean the same function. PyTorch is `torch_vit` for files in the names of
the hub or of timm, transformers for a Hugging Face directory. Not seen are tensors that
a forward pass does not use: `mask_token`.
"""

import functools
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Float, Float32

from sinder_jax import families, vit
from sinder_jax.data import decode, listing

StrPath = str | os.PathLike[str]

LIBRARIES = {"dinov2": "torch", "timm": "torch", "hf": "transformers"}
# What may be installed, by what it is imported as.
_TITLES = {"torch": "PyTorch", "transformers": "transformers"}
# By `model_type` of config.json.
_TRANSFORMERS = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}

# How far a model may amplify float32's rounding, which a token about to become
# defective does. RMS of the differences in epsilons per block, measured: 0.1 to 2 on
# random models, small ones and the hub's; 30 on tests/golden/moving. One weight or bias
# of another block in its place makes 700 and more (random S, whose blocks do little).
AMPLIFICATION = 100


class Comparison(NamedTuple):
    """How far the JAX model's tokens after the final norm are from PyTorch's.

    Attributes:
      difference: largest |a - b| over all tokens and channels.
      relative: RMS of a - b in units of the RMS of PyTorch's features. The verdict is
        by this one: the largest difference is that of a single token, and grows to
        1e-3 where one is about to become defective.
      tolerance: up to which `relative` is rounding, see the function `tolerance`.
      against: what was compared with, in words.
      image_size: side of the photograph in pixels.
    """

    difference: float
    relative: float
    tolerance: float
    against: str
    image_size: int

    @property
    def agree(self) -> bool:
        """Whether the difference is rounding; never so when something is NaN."""
        return self.relative <= self.tolerance

    def __str__(self) -> str:
        """The verdict in one line."""
        verdict = "agree with" if self.agree else "DIFFER from"
        return (
            f"features of a photograph ({self.image_size} pixels) {verdict} "
            f"{self.against}: RMS difference {self.relative:.1e} of the features "
            f"({self.tolerance:.1e} allowed), largest {self.difference:.1e}"
        )


class LoadReport(NamedTuple):
    """What transformers found amiss in a directory; all empty when it is whole.

    Attributes:
      missing: names of the model that the file lacks.
      unexpected: names of the file that the model lacks.
      mismatched: names whose shapes differ, with both shapes.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]


# --- The comparison ---------------------------------------------------------------


def unavailable(layout: str) -> str | None:
    """Why a file of `layout` cannot be compared here, in one line; None if it can.

    Raises:
      ValueError: an unknown layout.
    """
    if layout not in LIBRARIES:
        allowed = ", ".join(repr(name) for name in LIBRARIES)
        raise ValueError(f"unknown layout {layout!r}: allowed are {allowed}.")
    for name in dict.fromkeys(("torch", LIBRARIES[layout])):
        if importlib.util.find_spec(name) is None:
            return f"{_TITLES[name]} not installed: not compared"
    return None


def compare(
    config: vit.ViTConfig,
    params: Mapping[str, Any],
    source: StrPath | Mapping[str, np.ndarray],
    layout: str,
) -> Comparison | None:
    """Runs a photograph through the JAX model and through PyTorch.

    Args:
      config: the architecture.
      params: float32 arrays, of NumPy or JAX.
      source: what was read or written. For "dinov2" and "timm" the file, or its tensors
        by name as they stand in it (float16, bfloat16, float32 or float64; asked for
        when used); for "hf" the directory.
      layout: "dinov2", "timm" or "hf".

    Returns:
      The comparison, to be judged by `check`, or None where `unavailable(layout)` says
      that PyTorch or transformers is not installed.

    Raises:
      ValueError: an unknown layout, a file or directory that makes no model, that
        transformers finds incomplete, or that makes other tokens than the config says.
      FileNotFoundError: there is no such file or directory.
    """
    if unavailable(layout):
        return None
    image = photograph(config)
    # PyTorch first: a file that makes no model is refused sooner.
    theirs, against = torch_tokens(config, source, layout, image)
    difference, relative = measure(jax_tokens(config, params, image), theirs)
    return Comparison(difference, relative, tolerance(config), against, config.img_size)


def check(comparison: Comparison) -> None:
    """Raises ValueError, with the numbers, unless the two models agree."""
    if not comparison.agree:
        raise ValueError(f"{comparison}: this is not the same model.")


def tolerance(config: vit.ViTConfig) -> float:
    """Largest `Comparison.relative` that is rounding: epsilon, blocks, amplification.

    Every block adds about one rounding to each feature, and those after it amplify it:
    1.2e-7 · L · `AMPLIFICATION`, which is 1.4e-4 for S and 4.8e-4 for g.
    """
    return float(np.finfo(np.float32).eps) * config.depth * AMPLIFICATION


def measure(
    ours: Float[np.ndarray, "B T D"], theirs: Float[np.ndarray, "B T D"]
) -> tuple[float, float]:
    """Largest difference, and RMS of the differences over RMS of `theirs`."""
    difference = np.abs(ours - theirs, dtype=np.float64)
    relative = _rms(difference) / max(_rms(theirs), float(np.finfo(np.float32).tiny))
    return float(np.max(difference)), relative


def _rms(array: Float[np.ndarray, "B T D"]) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))


def photograph(config: vit.ViTConfig) -> Float32[np.ndarray, "1 size size 3"]:
    """The first packaged photograph, cropped to the stored grid and normalized.

    Raises:
      FileNotFoundError: scikit-image, which brings the photographs, is not installed.
    """
    image = decode.read_rgb(listing.sample_images()[0])
    crop = decode.training_crop(image, config.img_size, patch_size=config.patch_size)
    return decode.normalize(crop, families.of(config).statistics)[None]


# --- The two sides ----------------------------------------------------------------


def jax_tokens(
    config: vit.ViTConfig,
    params: Mapping[str, Any],
    images: Float32[np.ndarray, "B height width 3"],
) -> Float32[np.ndarray, "B T D"]:
    """Tokens after the final norm, by `vit.ViT` on JAX's default device."""
    cls, registers, patches = map(np.asarray, _apply(config, params, images))
    patches = rearrange(patches, "B H W D -> B (H W) D")
    return np.concatenate([cls[:, None], registers, patches], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _apply(config: vit.ViTConfig, params: Mapping[str, Any], images: Any) -> Any:
    return vit.ViT(config).apply({"params": params}, images)


def torch_tokens(
    config: vit.ViTConfig,
    source: StrPath | Mapping[str, np.ndarray],
    layout: str,
    images: Float32[np.ndarray, "B height width 3"],
) -> tuple[Float32[np.ndarray, "B T D"], str]:
    """Tokens after the final norm, by PyTorch on the CPU, and what computed them.

    Args:
      config: the architecture.
      source: as for `compare`.
      layout: likewise.
      images: normalized; of the stored grid's size, since layouts differ elsewhere.

    Raises:
      ValueError, FileNotFoundError: as `compare`.
      ImportError: PyTorch or transformers is not installed.
    """
    if layout == "hf":
        if isinstance(source, Mapping):
            raise ValueError("the hf layout is compared from its directory.")
        tokens, against = _transformers_tokens(source, images)
    else:
        tokens, against = _torch_vit_tokens(config, source, layout, images)
    patches = config.grid_size**2
    wanted = (len(images), 1 + config.num_register_tokens + patches, config.embed_dim)
    if tokens.shape != wanted:
        raise ValueError(f"{against} makes tokens {tokens.shape}, not {wanted}.")
    return tokens, against


def _torch_vit_tokens(
    config: vit.ViTConfig,
    source: StrPath | Mapping[str, np.ndarray],
    layout: str,
    images: Float32[np.ndarray, "B height width 3"],
) -> tuple[Float32[np.ndarray, "B T D"], str]:
    import torch

    from convert import torch_vit
    from convert.files import reading

    arrays = source if isinstance(source, Mapping) else reading.open_state_dict(source)
    try:
        with torch.inference_mode():
            out = torch_vit.features(
                _Tensors(arrays),
                _torch_images(images),
                num_heads=config.num_heads,
                norm_epsilon=families.of(config).norm_epsilon,
            )
    except KeyError as error:
        raise ValueError(f"no {layout} model: {error} is missing.") from None
    except RuntimeError as error:  # PyTorch's, for shapes that do not fit
        raise ValueError(f"no {layout} model: {_one_line(error)}.") from None
    tokens = torch.cat([out.cls[:, None], out.registers, out.patches.flatten(1, 2)], 1)
    against = f"PyTorch {torch.__version__} on the tensors of the {layout} layout"
    return tokens.numpy(), against


def _torch_images(images: Float32[np.ndarray, "B height width 3"]) -> Any:
    return _tensor(images).movedim(-1, 1).contiguous()


def _tensor(array: np.ndarray) -> Any:
    """The array as a float32 tensor, which shares its memory if it is float32."""
    import torch

    with warnings.catch_warnings():
        # A mapped file cannot be written to, and nothing here writes.
        warnings.filterwarnings("ignore", message=".*NumPy array is not writable")
        return torch.from_numpy(array.astype(np.float32, copy=False))


class _Tensors(Mapping[str, Any]):
    """Arrays by name as float32 tensors, each converted when it is asked for."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = arrays

    def __getitem__(self, name: str) -> Any:
        return _tensor(self.arrays[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


# --- transformers -----------------------------------------------------------------


def load_report(directory: StrPath) -> LoadReport:
    """Loads a Hugging Face directory with transformers; what it finds amiss.

    Args:
      directory: `config.json` and `model.safetensors`; nothing is downloaded.

    Raises:
      FileNotFoundError: there is no such directory.
      ValueError: it holds no DINOv2 model that transformers can load; one line.
      ImportError: transformers is not installed.
    """
    return _load(directory)[1]


def _transformers_tokens(
    directory: StrPath, images: Float32[np.ndarray, "B height width 3"]
) -> tuple[Float32[np.ndarray, "B T D"], str]:
    import torch
    import transformers

    model, report = _load(directory)
    amiss = "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
        for kind, names in report._asdict().items()
        if names
    )
    against = f"transformers {transformers.__version__} {type(model).__name__}"
    if amiss:
        raise ValueError(f"{directory}: {against} loads it with tensors {amiss}.")
    with torch.inference_mode():
        tokens = model(_torch_images(images)).last_hidden_state
    return tokens.numpy(), against


def _load(directory: StrPath) -> tuple[Any, LoadReport]:
    """The model in float32, and the report; what was missing in it is random."""
    import transformers

    directory = Path(directory)
    model_class = getattr(transformers, _model_class(directory))
    with _quiet_transformers():
        try:
            model, info = model_class.from_pretrained(
                directory,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported all the same, by name
                local_files_only=True,
            )
        # Its own OSError, safetensors' error, and those of config fields it refuses.
        except Exception as error:
            raise ValueError(
                f"{directory}: transformers cannot load it ({_one_line(error)})."
            ) from None
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    listed = (tuple(sorted(map(_as_text, info[kind]))) for kind in kinds)
    return model.float().eval(), LoadReport(*listed)


def _model_class(directory: Path) -> str:
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory.")
    path = directory / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8"))["model_type"]
        return _TRANSFORMERS[model_type]
    except FileNotFoundError:
        raise ValueError(f"{directory}: holds no config.json.") from None
    except (ValueError, KeyError, TypeError):
        allowed = " or ".join(_TRANSFORMERS)
        raise ValueError(f'{path}: its "model_type" must be {allowed}.') from None


def _as_text(entry: Any) -> str:
    """A name, or a misshapen tensor's name with the shapes found and wanted."""
    if isinstance(entry, str):
        return entry
    name, found, wanted = entry
    return f"{name} is {tuple(found)}, not {tuple(wanted)}"


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without progress bars and log lines, which come back as they were."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging as settings

    verbosity = settings.get_verbosity()
    bars = settings.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    settings.set_verbosity(logging.CRITICAL)
    settings.disable_progress_bar()  # and the hub's
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()
        else:
            hub.disable_progress_bars()


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(". ")
