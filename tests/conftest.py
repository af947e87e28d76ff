"""Sets up every test: strict JAX, two simulated CPU devices, checked types.

The environment is set before JAX starts, and the programs that a test starts inherit
it. pyproject.toml turns warnings into errors.
"""

import os
import signal
import sys
from pathlib import Path

from jaxtyping import install_import_hook

DEVICES = "--xla_force_host_platform_device_count"
TESTS = Path(__file__).parent

if "jax" in sys.modules:
    raise RuntimeError(
        "JAX was imported before tests/conftest.py could choose its devices: "
        "remove the pytest plugin that imports it"
    )

# Set these variables to test on an accelerator or another number of devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=2".strip()

# The programs that a test starts import this copy of the package, wherever they run and
# whichever copy is installed, and the modules that the tests share.
paths = [str(TESTS.parent), str(TESTS / "support"), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

# A shell has its jobs in the background ignore Ctrl-C, and all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402  (reads JAX_PLATFORMS and XLA_FLAGS)

# [H, W, D] + [D] is a mistake more often than not: write the axes out.
jax.config.update("jax_numpy_rank_promotion", "raise")
# The tolerances assume it; a CPU multiplies in float32 anyway.
jax.config.update("jax_default_matmul_precision", "highest")

# From here on beartype checks the shapes and dtypes of every annotated call into these
# packages.
install_import_hook(["sinder_jax", "convert"], "beartype.beartype")
