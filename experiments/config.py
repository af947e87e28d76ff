"""Configuration files: found by name, overridden from the command line, strict.

    --config=giant.py --config.lr=0.01 --load, override--> a locked ConfigDict

A bare name means `experiments/configs/`. A config is flat, and a value keeps the type
that the file gave it. `ml_collections.config_flags` would override as well, but reads
the flags of `sys.argv` rather than those of a `main(argv)`, and suggests no key for a
misspelt one.
"""

import difflib
import math
import os
import runpy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

CONFIGS = Path(__file__).parent / "configs"
MOST_SHOWN = 80  # characters of a wrong value
WORDS = {"first_block": {"auto": "-1"}}  # that stand for a number, by key


def load(
    name: str,
    folder: Path = CONFIGS,
    whole: Callable[[ConfigDict], str] = lambda config: "giant.py",
) -> ConfigDict:
    """The locked config of a file that defines `get_config()`.

    Args:
      name: a path, or the bare name of a file in `folder`.
      folder: where the configs of one program are.
      whole: names the file in `folder` that a config must have the keys and types of.

    Raises:
      FileNotFoundError: there is no such file; lists the configs of the folder.
      ValueError: the file defines no `get_config`, fails, or has other keys or types;
        and whatever `whole` raises.
    """
    path = Path(name)
    if not path.exists() and os.sep not in name:
        path = folder / (name if name.endswith(".py") else f"{name}.py")
    if not path.is_file():
        known = ", ".join(sorted(file.name for file in folder.glob("[!_]*.py")))
        raise FileNotFoundError(f"no config {name}; give a path or one of {known}")
    config = _run(path)
    if misfits := _misfits(config, _run(folder / whole(config))):
        raise ValueError(f"{path}: {misfits}; see the configs of {folder}")
    return config.lock()


def _run(path: Path) -> ConfigDict:
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = None if get_config is None else get_config()
    # The file may be the user's own and raise anything.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be used: {reason}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{path} defines no get_config() that returns a ConfigDict")
    return config


def _misfits(config: ConfigDict, like: ConfigDict) -> str:
    """Keys of `config` that are missing, unknown, or of another type than in `like`."""
    found = [f"{key} is missing" for key in like if key not in config]
    found += [f"{key} is unknown" for key in config if key not in like]
    found += [
        f"{key} is {type(config[key]).__name__}, not {type(like[key]).__name__}"
        for key in like
        if key in config and type(config[key]) is not type(like[key])
    ]
    return ", ".join(found)


def override(config: ConfigDict, arguments: Iterable[str]) -> None:
    """Applies arguments of the form `--config.key=value` or `--config.key value`.

    Raises:
      ValueError: an unknown key, with the nearest ones; a value of another type; an
        argument of another form.
    """
    arguments = iter(arguments)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        key = name.removeprefix("--config.")
        if key == name:
            raise ValueError(
                f"unknown argument {argument}; overrides are --config.KEY=VALUE"
            )
        if key not in config:
            near = difflib.get_close_matches(key, config.keys(), n=3, cutoff=0.5)
            known = f"it has {', '.join(sorted(config.keys()))}"
            hint = f"did you mean {' or '.join(near)}?" if near else known
            raise ValueError(f"the config has no key {key}: {hint}")
        text = text if equals else next(arguments, "")
        words = WORDS.get(key, {})
        try:
            config[key] = _value(words.get(text, text), config[key])
        except ValueError as wrong:
            error = " or ".join([str(wrong), *words])
            got = repr(text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}...")
            raise ValueError(f"--config.{key} must be {error}, got {got}") from None


def _value(text: str, old: Any) -> Any:
    """`text` as a value of the type of `old`; else raises what it must be."""
    if isinstance(old, str):
        if "\0" in text:
            raise ValueError("text without a NUL, which no path has")
        return text
    if isinstance(old, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    try:
        value = type(old)(text)
    except ValueError:
        value = math.nan
    if isinstance(value, float) and not math.isfinite(value):
        kind = "a number" if isinstance(old, float) else "a whole number"
        raise ValueError(f"{kind} like {old}")
    return value
