"""What every test runs under: strict JAX on two simulated CPU devices, typed calls.

The environment is set before JAX starts, and programs that a test starts inherit it.
Warnings are made errors by pyproject.toml.
"""

import os
import sys

from jaxtyping import install_import_hook

DEVICES = "--xla_force_host_platform_device_count"

if "jax" in sys.modules:
    raise RuntimeError(
        "JAX was imported before tests/conftest.py could choose its devices: "
        "remove the pytest plugin that imports it"
    )

# An accelerator, or another number of devices: for whoever asks by these variables.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=2".strip()

import jax  # noqa: E402  (reads the two variables)

# [H, W, D] + [D] is a mistake more often than not: write the axes out.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Says in one place what the tolerances assume; the CPU multiplies in float32 anyway.
jax.config.update("jax_default_matmul_precision", "highest")

# From here on importing these packages makes beartype check the shapes and dtypes of
# every annotated call.
install_import_hook(["sinder_jax", "convert"], "beartype.beartype")
