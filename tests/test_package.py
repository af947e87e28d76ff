"""The package is complete, and importing it needs no optional dependency."""

import pkgutil

import pytest

import convert
import places
import sinder_jax
from loading import loaded

OPTIONAL = {"torch", "transformers", "tensorflow", "huggingface_hub"}
TORCH_ONLY = "convert.torch_vit"  # imported only when needed


def modules_of(package):
    """Its name and those of all modules below it, command lines excepted."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    names = [module.name for module in found if module.name != TORCH_ONLY]
    return [package.__name__, *(name for name in names if "__main__" not in name)]


@pytest.mark.parametrize("package", ["sinder_jax", "convert", "experiments"])
def test_every_folder_of_modules_is_a_package(package):
    """Setuptools leaves a folder without __init__.py out of the wheel."""
    folders = {path.parent for path in (places.ROOT / package).rglob("*.py")}
    assert folders
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_importing_the_library_loads_no_optional_package():
    """A TPU host repairs a model without them."""
    modules = [*modules_of(sinder_jax), *modules_of(convert), "experiments.config"]
    some = {"sinder_jax.vit", "sinder_jax.repair", "convert.files.reading"}
    assert some <= set(modules)
    _, names = loaded(*modules)
    assert {"jax", "flax", "sinder_jax", "convert", "experiments"} <= names
    assert not OPTIONAL & names


def test_only_plots_load_matplotlib():
    """It would take a good part of a second from every command."""
    modules = [name for name in modules_of(sinder_jax) if ".plots." not in name]
    assert "sinder_jax.plots" in modules
    assert "matplotlib" not in loaded(*modules, *modules_of(convert))[1]
