"""What the door of arrays takes: numbers in many forms, kernels and covariances by name, priors that suit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cellfate.errors import DataError
from cellfate.kernels.base import Component, Given, Kernel
from cellfate.kernels.groups import Intercepts
from cellfate.model.checks import RESERVED, check_covariance, check_one_each, warn_of_two_dispersions
from cellfate.model.families import Family
from cellfate.model.priors import check_prior


def array(name: str, x: Any) -> np.ndarray:
    """What the user gives as an array of float64, from any device."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
    elif hasattr(x, "toarray"):
        x = x.toarray()
    try:
        return np.asarray(x, dtype=np.float64)
    except (TypeError, ValueError) as e:
        raise DataError(
            f"{name} cannot be read as numbers ({' '.join(str(e).split())}). Give an array of numbers; a fate of two levels "
            "is 0 and 1."
        ) from e


def numbers(name: str, x: Any, ndim: int, n: int | None = None) -> np.ndarray:
    """Finite numbers, one row per cell; one number of trials is that of every cell."""
    out = array(name, x)
    if name == "trials" and out.ndim == 0:
        out = np.full(int(n or 0), float(out))
    if out.ndim != ndim or (n is not None and len(out) != n) or len(out) == 0:
        raise DataError(f"{name} has shape {out.shape}, wanted {ndim} dimensions and {n or 'n'} rows, one per cell.")
    bad = int((~np.isfinite(out)).sum())
    if bad:
        raise DataError(f"{name} has {bad} values that are NaN or infinite. Leave those cells out.")
    return out


def term_names(terms: Sequence[str] | None, p: int) -> tuple[str, ...]:
    """A name per column of the design."""
    if terms is None:
        return tuple(f"x{i}" for i in range(p))
    names = [terms] if isinstance(terms, str) else list(terms)
    if len(names) != p or len(set(names)) < p or not all(isinstance(name, str) for name in names):
        raise DataError(f"terms are {names}, wanted {p} different names, one per column of X.")
    return tuple(names)


def named_components(components: Any, device: torch.device) -> tuple[Component, ...]:
    """Components with names of their own, from kernels and covariance matrices by name or from a list of them."""
    if isinstance(components, Mapping):
        components = [
            Component(name, kernel if isinstance(kernel, Kernel) else Given(_covariance(name, kernel, device)))
            for name, kernel in components.items()
        ]
    elif not isinstance(components, list | tuple) or not all(isinstance(c, Component) for c in components):
        bare = type(components[0] if isinstance(components, list | tuple) and components else components).__name__
        raise DataError(
            f"components are a {type(components).__name__} with no names (of {bare}). Give each a name: "
            "{'lineage': kernel_or_covariance, ...}."
        )
    found = tuple(components)
    if not found:
        raise DataError("there are no components to partition the variation into; give at least one.")
    names = [component.name for component in found]
    if len(set(names)) < len(names):
        raise DataError(f"component names repeat: {names}.")
    taken = [name for name in names if not isinstance(name, str) or not name or name in RESERVED]
    if taken:
        raise DataError(
            f"components cannot be called {taken}: {', '.join(RESERVED)} are rows of the tables. Rename them."
        )
    for component in found:
        if isinstance(component.kernel, Given):
            check_covariance(array(component.name, component.kernel.matrix), f"component {component.name!r}")
    return found


def _covariance(name: str, matrix: Any, device: torch.device) -> torch.Tensor:
    found = array(f"component {name!r}", matrix)
    return torch.as_tensor(found if found.ndim else found[None]).to(device)


def check_single_cells(components: Sequence[Component], family: Family, trials: np.ndarray | None) -> None:
    """Effects that every cell has for itself: at most one component of them, and a family that can show them."""
    own = [c.name for c in components if isinstance(c.kernel, Intercepts) and c.kernel.one_each]
    if len(own) > 1:
        raise DataError(f"components {own} are each an effect of its own for every cell: keep one of them.")
    for name in own:
        check_one_each(f"component {name!r} is", family.kind, trials)
        warn_of_two_dispersions(f"component {name!r} is", family.name, stacklevel=7)


def checked_priors(priors: Mapping[str, object] | None, components: Sequence[Component]) -> dict[str, object]:
    """The priors, each on the range of what it is for; names that the model does not have are its own error."""
    if priors is not None and not isinstance(priors, Mapping):
        raise DataError(
            f"priors are a {type(priors).__name__}, wanted a dict such as {{'sd_lineage': ('half_normal', 1)}}."
        )
    scales = {f"sd_{c.name}": "sd" for c in components} | {"sd_residual": "sd", "beta": "real"}
    scales |= {"dispersion": "log", "precision": "log"}
    held: dict[str, float] = {}
    for component in components:
        for hyper in component.kernel.hyperparameters:
            name = hyper.parameter(component.name)
            scales[name] = hyper.scale
            if hyper.fixed is not None:
                held[name] = hyper.fixed
    for name, spec in (priors or {}).items():
        if name.startswith("gap_"):
            scales[name] = "log"
        if name in held:
            raise DataError(
                f"priors name {name!r}, which is held at {held[name]:g}: a prior would do nothing. Leave out the one or the other."
            )
        if name in scales:
            check_prior(name, spec, scales[name])
    return dict(priors or {})
