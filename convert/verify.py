"""Does a converted model compute the same as the PyTorch model in the file?

    packaged photograph --JAX model on the params------------> tokens [1, T, D]
                        `-PyTorch on the tensors of the file--> tokens [1, T, D]
    both --measure--> Comparison --check--> ValueError unless they agree

One photograph at the size of the stored grid, where no position embedding is resampled
and all layouts mean the same function. PyTorch is `torch_vit` for files with the names
of the hub or of timm, transformers for a Hugging Face directory. A tensor that no
forward pass uses is not seen: `mask_token`.
"""

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Float, Float32

from convert import infer, layouts, opening
from convert.files import reading, sha256
from sinder_jax import families, vit
from sinder_jax import model as models
from sinder_jax.data import decode, listing
from sinder_jax.storage import files
from sinder_jax.storage.errors import reason_of

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
# A Hugging Face directory, or tensors named as by the hub or timm, in any float format.
Source = Path | Mapping[str, np.ndarray]


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


def print_verdict(jax_side: Path, torch_side: Path, *, made: Path, **told: Any) -> None:
    """Opens two files of one model and prints how far JAX and PyTorch are apart.

    Also prints what this does not check: a number of heads that no file tells would be
    the same wrong number on both sides.

    Args:
      jax_side: the model that JAX computes, in any layout.
      torch_side: the PyTorch files.
      made: the side that was just written; removed if the two differ.
      **told: what the user says of it, as for `opening.open_model`.

    Raises:
      ValueError: they differ by more than rounding.
    """
    in_jax = {name: told[name] for name in told if name != "prefix"}
    is_torch = reading.is_torch_source(jax_side)
    ours = opening.open_model(jax_side, **(told if is_torch else in_jax))
    theirs = opening.open_model(torch_side, **told)
    hugging_face = theirs.layout.startswith("hf")
    config = theirs.torch.contents.get(reading.CONFIG, {})
    loads = torch_side.is_dir() and config.get("model_type") in _TRANSFORMERS
    if hugging_face and not loads:
        print("verify: transformers loads directories of a DINOv2: not compared.")
        return
    source = torch_side if hugging_face else theirs.torch.tensors()
    try:
        comparison = compare(ours.config, ours.params, source)
    except ModuleNotFoundError as error:
        print(f"verify: {error.name} is not installed: not compared.")
        return
    fitted = layouts.fitted(ours, theirs.layout)
    different = models.differences(fitted.config, theirs.config)
    if different or not comparison.agree:
        sha256.side_file(made).unlink(missing_ok=True)
        files.remove(made)
    if different:
        raise ValueError(f"{jax_side} and {torch_side} differ in {different}")
    check(comparison)
    print(f"verify: {comparison}.")
    heads = theirs.torch.statements["num_heads"]
    if heads.words in infer.GUESSES:
        print(
            "verify: not checked: the number of attention heads, "
            f"{heads.value} on both sides, {heads.words}."
        )


def compare(
    config: vit.ViTConfig, params: Mapping[str, Any], source: Source
) -> Comparison:
    """Runs a photograph through the JAX model and through PyTorch.

    Args:
      config: the architecture.
      params: float32 arrays, of NumPy or JAX.
      source: what was read or written: a Hugging Face directory, or tensors by name.

    Returns:
      The comparison, to be judged by `check`.

    Raises:
      As `torch_tokens`.
    """
    image = photograph(config)
    # PyTorch first, since it refuses bad files sooner.
    theirs, against = torch_tokens(config, source, image)
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
    difference = np.subtract(ours, theirs, dtype=np.float64)
    scale = max(np.linalg.norm(theirs.astype(np.float64)), np.finfo(np.float32).tiny)
    return float(np.max(np.abs(difference))), float(np.linalg.norm(difference) / scale)


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
    config: vit.ViTConfig, source: Source, images: Images
) -> tuple[Tokens, str]:
    """Tokens after the final norm, by PyTorch on the CPU, and what computed them.

    Args:
      config: the architecture.
      source: as for `compare`.
      images: normalized; of the stored grid's size, since layouts differ elsewhere.

    Raises:
      ValueError: files that make no model, that transformers finds incomplete, or whose
        tokens do not fit the config.
      FileNotFoundError: there is no such directory, or no config.json in it.
      ModuleNotFoundError: PyTorch or transformers is not installed.
    """
    import torch

    pixels = _tensor(images).movedim(-1, 1).contiguous()
    with torch.inference_mode():
        if isinstance(source, Path):
            tokens, against = _transformers_tokens(source, pixels)
        else:
            tokens, against = _torch_vit_tokens(config, source, pixels)
    length = 1 + config.num_register_tokens + config.grid_size**2
    wanted = (len(images), length, config.embed_dim)
    if tokens.shape != wanted:
        raise ValueError(f"{against} makes tokens {tuple(tokens.shape)}, not {wanted}")
    return tokens.numpy(), against


def _torch_vit_tokens(
    config: vit.ViTConfig, arrays: Mapping[str, np.ndarray], pixels: Any
) -> tuple[Any, str]:
    import torch

    from convert import torch_vit

    try:
        tokens = torch_vit.features(
            {name: _tensor(array) for name, array in arrays.items()},
            pixels,
            num_heads=config.num_heads,
            norm_epsilon=families.of(config).norm_epsilon,
        )
    except (KeyError, RuntimeError) as error:  # a tensor is missing or misshapen
        raise ValueError(
            f"PyTorch cannot use the tensors: {reason_of(error)}"
        ) from None
    return tokens, f"PyTorch {torch.__version__} on the tensors"


def _tensor(array: np.ndarray) -> Any:
    """The array as a float32 tensor; shares its memory if it is float32."""
    import torch

    with warnings.catch_warnings():
        # A mapped file is read-only, and nothing here writes.
        warnings.filterwarnings("ignore", message=".*NumPy array is not writable")
        return torch.from_numpy(array.astype(np.float32, copy=False))


# --- transformers -----------------------------------------------------------------


def _transformers_tokens(directory: Path, pixels: Any) -> tuple[Any, str]:
    import transformers

    model, misfits = load(directory)
    against = f"transformers {transformers.__version__} {type(model).__name__}"
    if misfits:
        raise ValueError(
            f"{directory}: {against} loads it with tensors "
            f"{infer.listing_by_kind(misfits, limit=3)}"
        )
    return model(pixels).last_hidden_state, against


def load(directory: Path) -> tuple[Any, dict[str, list[str]]]:
    """Loads a Hugging Face directory with transformers, in float32.

    Returns:
      The model, in which missing tensors are random, and the names of "missing",
      "unexpected" and "mismatched" tensors, where there are any; a mismatched name
      comes with both shapes.

    Raises:
      FileNotFoundError: there is no such directory, or no config.json in it.
      ValueError: it holds no DINOv2 model that transformers can load; one line.
      ImportError: transformers is not installed.
    """
    import transformers

    path = directory / reading.CONFIG
    name = _TRANSFORMERS.get(str(reading.read_json(path).get("model_type")))
    if name is None:
        allowed = " or ".join(_TRANSFORMERS)
        raise ValueError(f'{path}: its "model_type" must be {allowed}')
    try:
        with _quiet():
            model, info = getattr(transformers, name).from_pretrained(
                directory,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported all the same, by name
                local_files_only=True,
            )
    # Its own OSError, safetensors' error, and those of config fields it refuses.
    except Exception as error:
        raise ValueError(
            f"{directory}: transformers cannot load it ({reason_of(error)})"
        ) from None
    _, heads = infer.backbone_keys(list(reading.open_state_dict(directory)))
    misfits = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(set(info["unexpected_keys"]) - set(heads)),
        "mismatched": [
            f"{key} is {tuple(found)}, not {tuple(wanted)}"
            for key, found, wanted in sorted(info["mismatched_keys"])
        ],
    }
    return model.float().eval(), {kind: keys for kind, keys in misfits.items() if keys}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences log lines, and the progress bars that transformers draws on stderr."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
