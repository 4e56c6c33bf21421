"""The settings of a fit as arguments once more: what was named is read again, what was handed over has to be handed over again."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cellfate.errors import DataError

GIVEN = "given"  # stands for what was handed over and not named
OBJECTS = ("lineage", "spatial", "graph", "niche", "offset", "trials")  # arguments that may have been
GRAPH = "graph"


def named(value: Any) -> Any:
    """How an argument is noted: its name, or number, or that it was given."""
    if value is None or (isinstance(value, str) and len(value) < 200):
        return value
    return value if isinstance(value, int | float | np.number) and not isinstance(value, bool) else GIVEN


def noted_groups(groups: Any, intercepts: Iterable[str]) -> dict[str, list[str]]:
    """Random effects as columns and formulas, so that they can be read again; `intercepts` are those of the fit."""
    formulas = dict(groups) if isinstance(groups, Mapping) else dict.fromkeys(intercepts)
    return {"group_columns": list(formulas), "group_formulas": [f or "~ 1" for f in formulas.values()]}


def reading(params: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :func:`cellfate.io.anndata.read_cells` after `fate`; `given` are those that are handed over again."""
    if "n_trees" in params:
        raise NotImplementedError(
            f"the fit pools over {int(params['n_trees'])} trees, and what is asked for is there for one tree only. Fit with one tree "
            "under another key_added, such as the one of the largest weight in `cf.get.trees(adata)`."
        )
    graph_field = params.get("spatial_kernel") == GRAPH
    again = {name: value for name, value in given.items() if value is not None}
    if graph_field and "graph" in again and params.get("spatial") == GIVEN:
        again.setdefault("spatial", again["graph"])
    out: dict[str, Any] = {name: _object(name, params, again) for name in OBJECTS}
    if graph_field and out["niche"] is None:
        out["graph"] = None  # `spatial` names it
    for name in ("family", "layer", "formula", "lineage_kernel", "spatial_kernel", "library_key"):
        if name in params:
            out[name] = str(params[name])
    columns, formulas = (np.atleast_1d(params.get(f"group_{x}", [])) for x in ("columns", "formulas"))
    out["groups"] = {str(c): str(f) for c, f in zip(columns, formulas, strict=True)} or []
    return out


def _object(name: str, params: Mapping[str, Any], again: Mapping[str, Any]) -> Any:
    value = params.get(name)
    if name in again:
        if value is None:
            raise DataError(f"{name} is given, but the fit had none: leave it out.")
        return again[name]
    if name == "graph" and params.get("spatial_kernel") == GRAPH and "niche" not in params:
        return None
    if isinstance(value, str) and value == GIVEN:
        what = {"lineage": "tree", "spatial": "coordinates" if params.get("spatial_kernel") != GRAPH else "graph"}
        raise DataError(
            f"the fit was made with a {name} that was handed over, not named, and is not in adata: hand it over again, "
            f"{name}=<{what.get(name, 'what it was')}>, or store it first (see `cf.pp.set_tree` for trees) and fit by its name."
        )
    return str(value) if isinstance(value, str) else value


def modelling(params: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :class:`cellfate.GLMM`, the device apart."""
    out = {name: str(params[name]).removeprefix("torch.") for name in ("link", "method", "engine", "dtype")}
    return {
        **out,
        "reml": bool(params["reml"]),
        "rank": int(params["rank"]) if "rank" in params else None,
        "priors": priors_of(params) or None,
        "per_fate": bool(params.get("per_fate", False)),
    }


def priors_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The priors that the fit was given, by parameter."""
    return {name: _prior(name, spec) for name, spec in (params.get("priors") or {}).items()}


def _prior(name: str, spec: Any) -> Any:
    """A prior as it was written before it became text, such as `('normal', 2.0)` or `HalfNormal(scale=2.0)`."""
    if not isinstance(spec, str) or spec.isidentifier():
        return spec
    made = re.fullmatch(r"([A-Za-z]+)\((.*)\)", spec)
    if made:
        kind = {"LogNormal": "lognormal", "Penalised": "pc"}.get(made[1]) or re.sub(
            r"(?<=[a-z])(?=[A-Z])", "_", made[1]
        ).lower()
        spec = f"({kind!r}, {re.sub(r'[a-z_]+=', '', made[2])})"
    try:
        return ast.literal_eval(re.sub(r"np\.float64\((.*?)\)", r"\1", spec))
    except (SyntaxError, ValueError) as e:
        raise DataError(f"the prior of {name!r} is noted as {spec!r}, which cannot be read again.") from e
