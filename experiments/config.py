"""Configuration files: found by name, overridden from the command line, strict.

    --config=giant.py --config.lr=0.01 --load, override--> a locked ConfigDict

A bare name means `experiments/configs/`. A config is flat; a value keeps the type that
the file gave it.
"""

import ast
import difflib
import os
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

CONFIGS = Path(__file__).parent / "configs"


def load(name: str) -> ConfigDict:
    """The locked config of a file that defines `get_config()`.

    Args:
      name: a path, or the bare name of a file in `experiments/configs/`.

    Raises:
      FileNotFoundError: there is no such file; lists the configs that come along.
      ValueError: the file defines no `get_config`.
    """
    path = Path(name)
    if not path.exists() and os.sep not in name:
        path = CONFIGS / (name if name.endswith(".py") else f"{name}.py")
    if not path.is_file():
        known = ", ".join(sorted(file.name for file in CONFIGS.glob("[!_]*.py")))
        raise FileNotFoundError(f"no config {name}; give a path or one of {known}")
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise ValueError(f"{path} defines no get_config(), so it is not a config")
    return ConfigDict(get_config()).lock()


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
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else (f"it has {', '.join(sorted(config.keys()))}")
            )
            raise ValueError(f"the config has no key {key}: {hint}")
        if not equals:
            text = next(arguments, "")
        config[key] = _value(key, text, config[key])


def _value(key: str, text: str, old: Any) -> Any:
    """`text` as a value of the type of `old`."""
    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--config.{key} must be true or false, got {text!r}")
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    numbers = (int, float) if isinstance(old, float) else (int,)
    if isinstance(value, bool) or not isinstance(value, numbers):
        kind = "number" if isinstance(old, float) else "whole number"
        raise ValueError(f"--config.{key} must be a {kind} like {old}, got {text!r}")
    return type(old)(value)
