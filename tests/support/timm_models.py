"""timm's own VisionTransformer, as a second opinion; skips where timm is not installed.

timm imports torchvision for transforms and a norm that no ViT uses, and torchvision has
to fit the installed torch exactly. Where it does not, empty modules stand in for it.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types

import pytest


class _Anything(type):
    """A class in which every name is text."""

    def __getattr__(cls, name):
        return name


class _Absent(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision and all its modules."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Absent(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def _without_torchvision():
    try:
        import torchvision  # noqa: F401
    except Exception:  # RuntimeError: built for another torch
        for name in [x for x in sys.modules if x.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        finder = _Finder()
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            for name in [x for x in sys.modules if x.startswith("torchvision")]:
                del sys.modules[name]
    else:
        yield


pytest.importorskip("torch")
with _without_torchvision():
    timm = pytest.importorskip("timm")
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    SwiGLUPacked = pytest.importorskip("timm.layers").SwiGLUPacked
