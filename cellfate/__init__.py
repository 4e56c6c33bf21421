"""How much of cell fate is ancestry, how much is neighborhood, and can the data tell the two apart."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cellfate._runtime import verbosity
from cellfate.errors import CellfateWarning, DataError

if TYPE_CHECKING:
    from cellfate import datasets, get, io, pl, pp, tl
    from cellfate.inference.fit import GLMM

__version__ = "0.1.0"
__all__ = ["GLMM", "CellfateWarning", "DataError", "datasets", "get", "io", "pl", "pp", "tl", "verbosity"]

# Loaded at first use: importing cellfate must not cost the seconds that torch, scanpy and matplotlib take.
_FACES = ("datasets", "get", "io", "pl", "pp", "tl")
_OBJECTS = {"GLMM": "cellfate.inference.fit"}


def __getattr__(name: str) -> Any:
    if name in _FACES:
        return import_module(f"cellfate.{name}")
    if name in _OBJECTS:
        return getattr(import_module(_OBJECTS[name]), name)
    raise AttributeError(f"module 'cellfate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
