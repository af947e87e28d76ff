"""Weights by name: which sources are names, and where their files are kept.

    dinov2_vitg14_reg --pooch--> <cache>/dinov2_vitg14_reg4_pretrain.pth
    owner/name        --huggingface_hub--> directory in its cache

The cache is $SINDER_CACHE, else $XDG_CACHE_HOME/sinder_jax, else ~/.cache/sinder_jax.
SINDER_HUB_URL replaces the address of the hub, for a mirror with the same folders;
HF_ENDPOINT and the other variables of huggingface_hub work as ever. A hub file in the
cache is used without asking the network. Nothing here imports JAX.
"""

import contextlib
import difflib
import fnmatch
import functools
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from rich import filesize

from sinder_jax import cli, families

TIMEOUT = 30.0  # seconds without an answer, or without a byte of the file
RETRIES = 2  # of a whole file
CHUNK = 1 << 20  # bytes

MODELS = families.published()
MODELS |= {model.alias: model for model in MODELS.values()}

# Files of a Hugging Face model: those beside the weights, and the weights, best first.
METADATA = ("config.json", "preprocessor_config.json")
WEIGHTS = (("*.safetensors", "*.safetensors.index.json"), ("pytorch_model.bin",))


def is_name(source: str) -> bool:
    """True if `source` is a model to fetch rather than a path.

    That is the name of a published model ("dinov2_vitg14_reg", or "…_reg4" as in the
    name of its file) or a Hugging Face id "owner/name", as long as nothing exists at
    that path. If "owner" is a folder here, or "name" ends like a file of weights,
    `source` is a mistyped path.
    """
    return not os.path.exists(source) and (source in MODELS or _is_repo_id(source))


def fetch(source: str) -> Path:
    """Downloads the weights of a model unless they are on this machine; returns where.

    Args:
      source: a name as in `is_name`.

    Returns:
      The `.pth` file of a hub model, or the directory of a Hugging Face model.

    Raises:
      ValueError: not a name; lists the nearest. Or SINDER_HUB_URL is not an HTTP
        address, or the Hugging Face model has no weights in a known format.
      OSError: no network, no such model, a full disk; says what to fetch by hand.
      ImportError: a Hugging Face id without huggingface_hub.
    """
    if _is_repo_id(source):
        return _fetch_hugging_face(source)
    return _fetch_hub(source)


def hub_url(name: str) -> str:
    """Address of a published model's file.

    Raises:
      ValueError: an unknown name, or SINDER_HUB_URL is not an HTTP address.
    """
    model = _published(name)
    url = os.environ.get("SINDER_HUB_URL") or model.hub_url
    if not re.fullmatch(r"https?://[\w.\-\[:\]]+(/[!-~]*)?", url, re.ASCII):
        raise ValueError(
            f"got SINDER_HUB_URL={url!r}, expected http(s)://host/folder without a "
            "user's name"
        )
    return f"{url.rstrip('/')}/{model.file}"


def cache_directory() -> Path:
    """The folder that hub files are kept in; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = os.environ.get("SINDER_CACHE") or os.path.join(base, "sinder_jax")
    return Path(os.path.expanduser(chosen))


def _is_repo_id(source: str) -> bool:
    part = r"\w[\w.-]*"
    return (
        re.fullmatch(f"({part})/{part}", source, re.ASCII) is not None
        and not source.endswith((".pth", ".pt", ".safetensors"))
        and not os.path.isdir(source.split("/")[0])
    )


def _published(name: str) -> families.Published:
    if name in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(name, MODELS, n=4) or MODELS
    raise ValueError(
        f"got {name!r}, expected a path that exists, a model such as "
        f"{', '.join(near)}, or a Hugging Face id owner/name whose owner is not a "
        "folder here"
    )


# --- The hub --------------------------------------------------------------------------


def _fetch_hub(name: str) -> Path:
    path = cache_directory() / Path(_published(name).file).name
    if path.is_file():
        return path
    import pooch

    pooch.get_logger().setLevel("WARNING")  # else three lines before that of the error
    url = hub_url(name)
    cache = pooch.create(
        path.parent,
        base_url=url.removesuffix(path.name),
        registry={path.name: None},
        retry_if_failed=RETRIES,
    )
    try:
        with contextlib.ExitStack() as answers:
            check = functools.partial(_check_response, path.parent, answers)
            downloader = pooch.HTTPDownloader(
                progressbar=sys.stderr.isatty(),
                chunk_size=CHUNK,
                timeout=TIMEOUT,
                hooks={"response": check},
            )
            cache.fetch(path.name, downloader=downloader)
        path.chmod(0o644)  # pooch leaves the mode of a temporary file
    except (OSError, ValueError) as error:
        reason = cli.one_line(_innermost(error))[:200]
        raise OSError(
            f"{path.name}: not fetched to {path.parent}: {reason}; fetch {url} by hand "
            "and give its path instead: python -m convert to-jax FILE DST"
        ) from None
    return path


def _check_response(
    folder: Path, answers: contextlib.ExitStack, response: Any, **_: Any
) -> None:
    """Refuses an answer that cannot be the file, before its bytes are read."""
    answers.callback(response.close)
    status, kind = response.status_code, response.headers.get("Content-Type", "")
    size = int(response.headers.get("Content-Length", 0))
    free = shutil.disk_usage(folder).free
    if response.is_redirect or status >= 500 or status in (408, 429):
        return  # followed, or an error by which pooch tries again
    if status >= 400:
        refusal = f"HTTP {status} {response.reason}"
    elif kind.startswith("text/html"):
        refusal = "the server sent a web page, such as a login, instead of the file"
    elif not size:  # a lost connection would look like the end of the file
        refusal = "the server does not say how long the file is"
    elif free < size:
        refusal = (
            f"it needs {filesize.decimal(size)}, {filesize.decimal(free)} are free; "
            "make room or set SINDER_CACHE to another folder"
        )
    else:
        print(f"fetching {response.url}, {filesize.decimal(size)}, to {folder}")
        return
    raise OSError(refusal)


def _innermost(error: BaseException) -> BaseException:
    while isinstance(inner := error.__cause__ or error.__context__, Exception):
        error = inner
    return error


# --- Hugging Face ---------------------------------------------------------------------


def _fetch_hugging_face(repo_id: str) -> Path:
    url = f"https://huggingface.co/{repo_id}"
    by_hand = f"or fetch the files of {url} by hand and give their path instead"
    try:
        import huggingface_hub as hub
    except ImportError:
        raise ImportError(
            f"{repo_id}: needs huggingface_hub: pip install huggingface_hub, {by_hand}"
        ) from None
    try:
        # Asked first because snapshot_download would wait for an answer without end.
        info = hub.model_info(repo_id, timeout=TIMEOUT)
        files = [file.rfilename for file in info.siblings or ()]
        top = [file for file in files if "/" not in file]
        for weights in WEIGHTS:
            if fnmatch.filter(top, weights[0]):
                return _snapshot(hub, repo_id, weights)
    # HTTP errors of the hub, and whatever its HTTP library (three so far) calls a lost
    # connection or a full disk.
    except Exception as error:
        for weights in WEIGHTS:
            with contextlib.suppress(Exception):  # not in the cache, or not all of it
                cached = _snapshot(hub, repo_id, weights, local_files_only=True)
                if any(cached.glob(weights[0])):
                    return cached
        reason = _hugging_face_reason(error)
        raise OSError(f"{repo_id}: not fetched: {reason}; {by_hand}") from None
    raise ValueError(
        f"{repo_id}: no weights in a known format: got "
        f"{', '.join(sorted(files)[:8]) or 'no file'} at {url}, expected *.safetensors "
        "or pytorch_model.bin"
    )


def _snapshot(hub: Any, repo_id: str, weights: tuple[str, ...], **options: Any) -> Path:
    return Path(
        hub.snapshot_download(
            repo_id,
            allow_patterns=[*METADATA, *weights],
            ignore_patterns=["*/*"],  # other formats and other models in folders
            etag_timeout=TIMEOUT,
            **options,
        )
    )


def _hugging_face_reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its owner wants you to agree to terms first (there, then hf auth login)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "Hugging Face has no such model, or a private one (hf auth login)"
    return cli.one_line(error)[:200]
