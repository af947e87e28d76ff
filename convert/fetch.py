"""Weights by name: which sources are names, and where their files are kept.

    dinov2_vitg14_reg --fetch--> <cache>/dinov2_vitg14_reg4_pretrain.pth
    owner/name        --fetch--> directory in the cache of huggingface_hub

The cache is $SINDER_CACHE, else $XDG_CACHE_HOME/sinder_jax, else ~/.cache/sinder_jax.
SINDER_HUB_URL replaces https://dl.fbaipublicfiles.com/dinov2, for a mirror with the
same folders; HF_ENDPOINT and the other variables of huggingface_hub are honored by it.
A hub file in the cache is used without asking the network. Nothing here imports JAX,
except `hub_config`.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any

from rich import filesize

from convert import download

HUB_URL = "https://dl.fbaipublicfiles.com/dinov2"
# The keys of vit.CONFIGS, written out because importing them means importing JAX.
HUB_NAMES = tuple(
    f"dinov2_vit{size}14{suffix}" for suffix in ("", "_reg") for size in "sbgl"
)

# Hugging Face: what a model needs besides its weights, and where these can be.
METADATA = ("config.json", "preprocessor_config.json")
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
PYTORCH = ("pytorch_model.bin",)


def is_name(source: str) -> bool:
    """Whether `source` is a model to fetch rather than a path.

    True for the name of a hub model ("dinov2_vitg14_reg", or "…_reg4" as in the name of
    its file) and for a Hugging Face id "owner/name", as long as nothing exists at that
    path. An "owner" that is a folder here, or a "name" with the suffix of a file of
    weights, makes a mistyped path and no id.
    """
    if os.path.exists(source):
        return False
    return _hub_key(source) is not None or _is_repo_id(source)


def fetch(source: str) -> Path:
    """Where the weights are on this machine, after downloading what is not yet there.

    An interrupted download goes on where it stopped. Progress is shown on stderr.

    Args:
      source: a name as in `is_name`.

    Returns:
      The `.pth` file of a hub model, or the directory of a Hugging Face model.

    Raises:
      ValueError: no name; says the nearest ones. SINDER_HUB_URL is no HTTP address, or
        the Hugging Face model has no weights that can be read.
      OSError: no network, no such model, a full disk …; says what to fetch by hand.
      ImportError: a Hugging Face id without huggingface_hub.
    """
    if _hub_key(source) is not None:
        return _fetch_hub(source)
    _check_is_repo_id(source)
    return _fetch_hugging_face(source)


def hub_url(name: str) -> str:
    """Address of a hub model's file.

    Raises:
      ValueError: an unknown name, or SINDER_HUB_URL is no HTTP address.
    """
    folder = _checked_hub_key(name).removesuffix("_reg")
    return f"{_base_url()}/{folder}/{_file_name(name)}"


def hub_config(name: str) -> Any:
    """The `vit.ViTConfig` of a hub name; None for a Hugging Face id.

    Raises:
      ValueError: no name; says the nearest ones.
    """
    key = _hub_key(name)
    if key is None:
        _check_is_repo_id(name)
        return None
    from sinder_jax import vit

    return vit.CONFIGS[key]


def cache_directory() -> Path:
    """The folder that hub files are kept in; it need not exist."""
    chosen = os.environ.get("SINDER_CACHE")
    if not chosen:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        chosen = os.path.join(base, "sinder_jax")
    return Path(os.path.expanduser(chosen))


# --- Names ------------------------------------------------------------------------


def _hub_key(source: str) -> str | None:
    key = source.removesuffix("4") if source.endswith("_reg4") else source
    return key if key in HUB_NAMES else None


def _checked_hub_key(name: str) -> str:
    key = _hub_key(name)
    if key is None:
        near = difflib.get_close_matches(name, HUB_NAMES, n=4) or HUB_NAMES
        raise ValueError(
            f"{name!r} is no model's name; the nearest are {', '.join(near)}; "
            "a Hugging Face id is owner/name."
        )
    return key


def _is_repo_id(source: str) -> bool:
    part = r"\w[\w.-]*"
    return (
        re.fullmatch(f"({part})/{part}", source, re.ASCII) is not None
        and not source.endswith((".pth", ".pt", ".safetensors"))
        and not os.path.isdir(source.split("/")[0])
    )


def _check_is_repo_id(source: str) -> None:
    if _is_repo_id(source):
        return
    if "/" not in source:
        _checked_hub_key(source)
    raise ValueError(
        f"{source!r} is no Hugging Face id: that is owner/name, where owner is no "
        "folder here and name has no suffix of a file of weights; names of the DINOv2 "
        f"hub are {', '.join(HUB_NAMES)}."
    )


def _file_name(name: str) -> str:
    """Name of the file, there and in the cache."""
    key = _checked_hub_key(name)
    return f"{key.replace('_reg', '_reg4')}_pretrain.pth"


def _base_url() -> str:
    url = os.environ.get("SINDER_HUB_URL") or HUB_URL
    if not re.fullmatch(r"https?://[\w.\-\[:\]]+(/[!-~]*)?", url, re.ASCII):
        raise ValueError(
            f"SINDER_HUB_URL={url!r} is no address; allowed is http(s)://host/folder, "
            "without a user's name."
        )
    return url.rstrip("/")


# --- The hub ----------------------------------------------------------------------


def _fetch_hub(name: str) -> Path:
    path = cache_directory() / _file_name(name)
    if path.is_file():
        return path
    url = hub_url(name)
    try:
        download.download(url, path)
        return path
    except download.DiskFull as error:
        what = f"{error}; make room or set SINDER_CACHE to another folder"
    except download.Failed as error:
        what = str(error)
    except OSError as error:
        reason = download.reason(error)
        what = f"{path.parent} cannot be written ({reason}; SINDER_CACHE moves it)"
    size = download.kept(url, path)
    kept = f"{filesize.decimal(size)} are kept and the same call goes on there, or "
    raise OSError(
        _one_line(
            f"{path.name}: not fetched: {what}; {kept if size else ''}fetch {url} by "
            "hand and give its path instead: python -m convert to-jax FILE DST"
        )
    )


# --- Hugging Face -----------------------------------------------------------------


def _fetch_hugging_face(repo_id: str) -> Path:
    url = f"https://huggingface.co/{repo_id}"
    by_hand = f"or fetch the files of {url} by hand and give their path instead"
    try:
        import huggingface_hub as hub
    except ImportError:
        raise ImportError(
            f"{repo_id}: needs huggingface_hub: pip install huggingface_hub, {by_hand}."
        ) from None
    try:
        # Asked first because snapshot_download would wait for it without end.
        info = hub.model_info(repo_id, timeout=download.TIMEOUT)
        files = [file.rfilename for file in info.siblings or ()]
        weights = _weights(files)
        if weights is not None:
            return _snapshot(hub, repo_id, weights)
    # HTTP errors of the hub, and whatever its HTTP library (three so far) calls a lost
    # connection or a full disk.
    except Exception as error:
        cached = _cached_snapshot(hub, repo_id)
        if cached is not None:
            return cached
        what = _hugging_face_reason(error)
        raise OSError(_one_line(f"{repo_id}: not fetched: {what}; {by_hand}")) from None
    raise ValueError(
        f"{repo_id}: no weights that can be read; wanted is *.safetensors or "
        f"pytorch_model.bin, {url} has {', '.join(sorted(files)[:8]) or 'no file'}."
    )


def _weights(files: list[str]) -> tuple[str, ...] | None:
    if any("/" not in file and file.endswith(".safetensors") for file in files):
        return SAFETENSORS
    return PYTORCH if "pytorch_model.bin" in files else None


def _snapshot(hub: Any, repo_id: str, weights: tuple[str, ...], **options: Any) -> Path:
    return Path(
        hub.snapshot_download(
            repo_id,
            allow_patterns=[*METADATA, *weights],
            ignore_patterns=["*/*"],  # other formats and other models in folders
            etag_timeout=download.TIMEOUT,
            **options,
        )
    )


def _cached_snapshot(hub: Any, repo_id: str) -> Path | None:
    for weights in (SAFETENSORS, PYTORCH):
        try:
            directory = _snapshot(hub, repo_id, weights, local_files_only=True)
        except Exception:  # not there, or not all of it
            continue
        if any(directory.glob(weights[0])):
            return directory
    return None


def _hugging_face_reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its owner wants you to agree to terms first (there, then hf auth login)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "Hugging Face has no such model, or a private one (hf auth login)"
    return download.reason(error)


def _one_line(text: str) -> str:
    return f"{' '.join(text.split())}."
