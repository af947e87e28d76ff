"""What importing the package costs: nothing that is optional."""

import json
import pkgutil
import subprocess
import sys

import convert
import places
import sinder_jax

OPTIONAL = ("torch", "transformers", "tensorflow", "matplotlib", "huggingface_hub")
TORCH_ONLY = "convert.torch_vit"  # which nothing imports before it is needed

IMPORT_ALL = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def modules_of(package):
    """Its name and those of all modules below it, command lines excepted."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    names = [module.name for module in found if module.name != TORCH_ONLY]
    return [package.__name__, *(name for name in names if "__main__" not in name)]


def test_importing_the_library_loads_no_optional_package():
    """A TPU host repairs a model without them."""
    modules = [*modules_of(sinder_jax), *modules_of(convert), "experiments.config"]
    some = {"sinder_jax.vit", "sinder_jax.repair", "convert.files.reading"}
    assert some <= set(modules)
    ended = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *modules],
        cwd=places.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    loaded = json.loads(ended.stdout)
    assert {"jax", "flax", "sinder_jax", "convert", "experiments"} <= set(loaded)
    assert not set(OPTIONAL) & set(loaded)
