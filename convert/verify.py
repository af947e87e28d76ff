"""Does a converted model compute the same as the PyTorch model in the file?

    packaged photograph --JAX model on the params------------> tokens [1, T, D]
                        `-PyTorch on the tensors of the file--> tokens [1, T, D]
    both --measure--> Comparison --check--> ValueError unless they agree

One photograph at the size of the stored grid, where no position embedding is resampled
and all layouts mean the same function. PyTorch is `torch_vit` for files with the names
of the hub or of timm, transformers for a Hugging Face directory. A tensor that no
forward pass uses is not seen: `mask_token`.
"""

import functools
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Float, Float32

from convert import opening
from convert.files import reading, writing
from convert.files.tensors import reason
from sinder_jax import families, vit
from sinder_jax.data import decode, listing
from sinder_jax.storage.paths import StrPath

# What each layout needs, and what the libraries are called.
LIBRARIES = {"dinov2": ("torch",), "timm": ("torch",), "hf": ("torch", "transformers")}
_TITLES = {"torch": "PyTorch", "transformers": "transformers"}
# By `model_type` of config.json.
_TRANSFORMERS = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}

# How far a model may amplify float32's rounding, as it does in a token about to become
# defective. RMS of the differences in epsilons per block, measured: 0.1 to 2 on random
# models, small ones and of the hub's sizes; 30 on tests/golden/moving. One weight or
# bias of another block in its place makes 700 and more (random S, whose blocks do
# little).
AMPLIFICATION = 100

Images = Float32[np.ndarray, "B height width 3"]
Tokens = Float32[np.ndarray, "B T D"]
Source = StrPath | Mapping[str, np.ndarray]


class Comparison(NamedTuple):
    """How far the JAX model's tokens after the final norm are from PyTorch's.

    Attributes:
      difference: largest |a - b| over all tokens and channels.
      relative: RMS of a - b in units of the RMS of PyTorch's features. The verdict uses
        this number: the largest difference is that of a single token, and grows to 1e-3
        where a token is about to become defective.
      tolerance: largest `relative` that is rounding, see the function `tolerance`.
      against: what the JAX model was compared with, in words.
      image_size: side of the photograph in pixels.
    """

    difference: float
    relative: float
    tolerance: float
    against: str
    image_size: int

    @property
    def agree(self) -> bool:
        """True if the difference is rounding; False if anything is NaN."""
        return self.relative <= self.tolerance

    def __str__(self) -> str:
        """The verdict in one line."""
        verdict = "agree with" if self.agree else "DIFFER from"
        return (
            f"features of a photograph ({self.image_size} pixels) {verdict} "
            f"{self.against}: RMS difference {self.relative:.1e} of the features "
            f"({self.tolerance:.1e} allowed), largest {self.difference:.1e}"
        )


# --- The comparison ---------------------------------------------------------------


def print_verdict(jax_side: Path, torch_side: Path, *, made: Path) -> None:
    """Opens two files of one model and prints how far JAX and PyTorch are apart.

    Args:
      jax_side: the model that JAX computes, in any layout.
      torch_side: the PyTorch files.
      made: the side that was just written; removed if the two differ.

    Raises:
      ValueError: they differ by more than rounding.
    """
    ours = opening.open_model(jax_side)
    theirs = opening.open_model(torch_side, ours.config.num_heads)
    layout = "hf" if theirs.layout.startswith("hf") else theirs.layout
    reason = unavailable(layout)
    if reason is None and layout == "hf" and not torch_side.is_dir():
        reason = "transformers loads directories: not compared"
    if reason:
        print(f"verify: {reason}.")
        return
    source = torch_side if layout == "hf" else theirs.torch.tensors()
    comparison = compare(ours.config, ours.params, source, layout)
    assert comparison is not None
    try:
        check(comparison)
    except ValueError:
        writing.remove(made)
        raise
    print(f"verify: {comparison}.")


def unavailable(layout: str) -> str | None:
    """Why files of `layout` cannot be compared here, in one line; None if they can.

    Raises:
      ValueError: an unknown layout.
    """
    if layout not in LIBRARIES:
        allowed = ", ".join(repr(name) for name in LIBRARIES)
        raise ValueError(f"unknown layout {layout!r}; use {allowed}")
    for name in LIBRARIES[layout]:
        if importlib.util.find_spec(name) is None:
            return f"{_TITLES[name]} not installed: not compared"
    return None


def compare(
    config: vit.ViTConfig, params: Mapping[str, Any], source: Source, layout: str
) -> Comparison | None:
    """Runs a photograph through the JAX model and through PyTorch.

    Args:
      config: the architecture.
      params: float32 arrays, of NumPy or JAX.
      source: what was read or written. For "dinov2" and "timm" the file, or its tensors
        by name in their number format (float16, bfloat16, float32 or float64), read as
        they are used; for "hf" the directory.
      layout: "dinov2", "timm" or "hf".

    Returns:
      The comparison, to be judged by `check`, or None if `unavailable(layout)` says
      that PyTorch or transformers is not installed.

    Raises:
      ValueError: an unknown layout; or files that make no model, that transformers
        finds incomplete, or whose tokens do not fit the config.
      FileNotFoundError: there is no such file or directory.
    """
    if unavailable(layout):
        return None
    image = photograph(config)
    # PyTorch first, since it refuses bad files sooner.
    theirs, against = torch_tokens(config, source, layout, image)
    difference, relative = measure(jax_tokens(config, params, image), theirs)
    return Comparison(difference, relative, tolerance(config), against, config.img_size)


def check(comparison: Comparison) -> None:
    """Raises ValueError, with the numbers, unless the two models agree."""
    if not comparison.agree:
        raise ValueError(f"{comparison}: this is not the same model")


def tolerance(config: vit.ViTConfig) -> float:
    """Largest `Comparison.relative` that is rounding: epsilon · L · `AMPLIFICATION`.

    Every block adds about one rounding to each feature, and the blocks after it amplify
    that: 1.4e-4 for S and 4.8e-4 for g.
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
      FileNotFoundError: scikit-image, which provides it, is not installed.
    """
    image = decode.read_rgb(listing.sample_images()[0])
    crop = decode.training_crop(image, config.img_size, patch_size=config.patch_size)
    return decode.normalize(crop, families.of(config).statistics)[None]


def jax_tokens(
    config: vit.ViTConfig, params: Mapping[str, Any], images: Images
) -> Tokens:
    """Tokens after the final norm, by `vit.ViT` on JAX's default device."""
    cls, registers, patches = map(np.asarray, _apply(config, params, images))
    patches = rearrange(patches, "B H W D -> B (H W) D")
    return np.concatenate([cls[:, None], registers, patches], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _apply(config: vit.ViTConfig, params: Mapping[str, Any], images: Any) -> Any:
    return vit.ViT(config).apply({"params": params}, images)


# --- PyTorch ----------------------------------------------------------------------


def torch_tokens(
    config: vit.ViTConfig, source: Source, layout: str, images: Images
) -> tuple[Tokens, str]:
    """Tokens after the final norm, by PyTorch on the CPU, and what computed them.

    Args:
      config: the architecture.
      source: as for `compare`.
      layout: as for `compare`.
      images: normalized; of the stored grid's size, since layouts differ elsewhere.

    Raises:
      ValueError, FileNotFoundError: as `compare`.
      ImportError: PyTorch or transformers is not installed.
    """
    if layout != "hf":
        tokens, against = _torch_vit_tokens(config, source, layout, images)
    elif isinstance(source, Mapping):
        raise ValueError("got tensors for the layout hf, expected a directory")
    else:
        tokens, against = _transformers_tokens(Path(source), images)
    patches = config.grid_size**2
    wanted = (len(images), 1 + config.num_register_tokens + patches, config.embed_dim)
    if tokens.shape != wanted:
        raise ValueError(f"{against} makes tokens {tokens.shape}, not {wanted}")
    return tokens, against


def _torch_vit_tokens(
    config: vit.ViTConfig, source: Source, layout: str, images: Images
) -> tuple[Tokens, str]:
    import torch

    from convert import torch_vit

    arrays = source if isinstance(source, Mapping) else reading.open_state_dict(source)
    try:
        with torch.inference_mode():
            out = torch_vit.features(
                {name: _tensor(array) for name, array in arrays.items()},
                _torch_images(images),
                num_heads=config.num_heads,
                norm_epsilon=families.of(config).norm_epsilon,
            )
    except KeyError as error:
        raise ValueError(f"not a {layout} model: {error} is missing") from None
    except RuntimeError as error:  # PyTorch's, for shapes that do not fit
        raise ValueError(f"not a {layout} model: {reason(error)}") from None
    tokens = torch.cat([out.cls[:, None], out.registers, out.patches.flatten(1, 2)], 1)
    against = f"PyTorch {torch.__version__} on the tensors of the {layout} layout"
    return tokens.numpy(), against


def _torch_images(images: Images) -> Any:
    return _tensor(images).movedim(-1, 1).contiguous()


def _tensor(array: np.ndarray) -> Any:
    """The array as a float32 tensor; shares its memory if it is float32."""
    import torch

    with warnings.catch_warnings():
        # A mapped file is read-only, and nothing here writes.
        warnings.filterwarnings("ignore", message=".*NumPy array is not writable")
        return torch.from_numpy(array.astype(np.float32, copy=False))


# --- transformers -----------------------------------------------------------------


def _transformers_tokens(directory: Path, images: Images) -> tuple[Tokens, str]:
    import torch
    import transformers

    model, misfits = load(directory)
    against = f"transformers {transformers.__version__} {type(model).__name__}"
    if misfits:
        listed = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
            for kind, names in misfits.items()
        )
        raise ValueError(f"{directory}: {against} loads it with tensors {listed}")
    with torch.inference_mode():
        tokens = model(_torch_images(images)).last_hidden_state
    return tokens.numpy(), against


def load(directory: Path) -> tuple[Any, dict[str, list[str]]]:
    """Loads a Hugging Face directory with transformers, in float32.

    Returns:
      The model, in which missing tensors are random, and the names of "missing",
      "unexpected" and "mismatched" tensors, where there are any; a mismatched name
      comes with both shapes.

    Raises:
      FileNotFoundError: there is no such directory.
      ValueError: it holds no DINOv2 model that transformers can load; one line.
      ImportError: transformers is not installed.
    """
    import transformers

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
                f"{directory}: transformers cannot load it ({reason(error)})"
            ) from None
    found = {
        kind: sorted(map(_as_text, info[f"{kind}_keys"]))
        for kind in ("missing", "unexpected", "mismatched")
    }
    misfits = {kind: names for kind, names in found.items() if names}
    return model.float().eval(), misfits


def _model_class(directory: Path) -> str:
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    path = directory / reading.CONFIG
    try:
        return _TRANSFORMERS[json.loads(path.read_text())["model_type"]]
    except FileNotFoundError:
        raise ValueError(f"{directory}: holds no {reading.CONFIG}") from None
    except (ValueError, KeyError, TypeError):
        allowed = " or ".join(_TRANSFORMERS)
        raise ValueError(f'{path}: its "model_type" must be {allowed}') from None


def _as_text(entry: Any) -> str:
    """A name, or a misshapen tensor's name with the shapes found and wanted."""
    if isinstance(entry, str):
        return entry
    name, found, wanted = entry
    return f"{name} is {tuple(found)}, not {tuple(wanted)}"


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences progress bars and log lines, then restores the user's settings."""
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
        (hub.enable_progress_bars if hub_bars else hub.disable_progress_bars)()
