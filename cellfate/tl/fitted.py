"""A fit in `adata`, read again: its cells and its model, for what is asked of it later."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cellfate import _keys, get
from cellfate.cells import Cells
from cellfate.errors import CellfateWarning, DataError
from cellfate.inference.fit import GLMM
from cellfate.io.again import modelling, reading
from cellfate.io.anndata import read_cells
from cellfate.io.many import Fates, find_fates
from cellfate.tl.components import components_of

if TYPE_CHECKING:
    import torch
    from anndata import AnnData


@dataclass(frozen=True, eq=False)
class Fitted:
    """Cells and model of a fit, its posterior draws and mode by name, its settings, and the arguments with which it was read."""

    cells: Cells
    glmm: GLMM
    draws: dict[str, np.ndarray]
    mode: dict[str, float]
    params: dict[str, Any]
    arguments: dict[str, Any]

    def priors_among(self, components: Sequence[str]) -> dict[str, Any]:
        """The priors of the fit that are of a model with these components only."""
        gone = {c.name for c in self.glmm.components if c.name not in components}

        def stays(name: str) -> bool:
            # sd_batch:time is of batch:time, and goes with batch where that is no component itself
            of = name.partition("_")[2]
            return of in components or (of not in gone and of.partition(":")[0] not in gone)

        return {name: prior for name, prior in self.glmm.priors.items() if stays(name)}


def fitted(
    adata: AnnData,
    key: str,
    handed: Mapping[str, Any],
    device: str | torch.device,
    change: Callable[[Cells, Mapping[str, Any]], Cells] | None = None,
) -> Fitted:
    """The fit under `key`; `handed` was handed over to it and not named. `change` makes other cells of them for the model."""
    params = get.params(adata, key)
    if many(adata, key):
        count = len(get.responses(adata, key))
        raise DataError(
            f"adata.uns[{key!r}] holds the fits of {count} fates, and this is asked of one. Fit it by itself, `cf.tl.decompose(adata, "
            "'<its name>', ..., key_added='<another key>')`, and name that key."
        )
    arguments = reading(params, handed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellfateWarning)  # the fit has said them
        cells = read_cells(adata, str(params["fate"]), **arguments)
        _check_same(adata, key, params, cells)
        if change is not None:
            cells = change(cells, arguments)
        glmm = _model(cells, params, device)
    stored = get.draws(adata, key)
    draws = {name: stored[name].to_numpy() for name in stored.columns}
    return Fitted(cells, glmm, draws, dict(adata.uns[key][_keys.MODE]), params, arguments)


def fitted_all(
    adata: AnnData, key: str, handed: Mapping[str, Any], device: str | torch.device
) -> tuple[Fitted, Fates | None]:
    """The same for a fit of many fates, too: cells and model without a fate, draws or mode, and the fates to read."""
    if not many(adata, key):
        return fitted(adata, key, handed, device), None
    params = get.params(adata, key)
    arguments = reading(params, handed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellfateWarning)
        cells = read_cells(adata, None, **arguments)
        if int(params["n_cells"]) != len(cells.names):
            raise DataError(
                f"the fits were made on {int(params['n_cells'])} cells, and {len(cells.names)} are read now. Go on from the adata that "
                "was fitted, or fit this one."
            )
        glmm = _glmm(cells, params, device)
    names = get.responses(adata, key)["response"].tolist()
    layer = str(params["layer"]) if "layer" in params else None
    trials, kind = arguments["trials"], glmm.family.kind
    fates = find_fates(adata, names, layer=layer, min_cells=0, kind=kind, trials=trials, kept=cells.kept)
    return Fitted(cells, glmm, {}, {}, params, arguments), fates


def check_there(fit: Fitted, what: str) -> None:
    """Refuse fits of which something cannot be asked yet, and say what it was of this one."""
    if fit.glmm.family.name == "categorical":
        raise NotImplementedError(
            f"{what} are not there yet for family='categorical', which the fit is of. Ask about one fate at a time: fit each against the rest "
            "with family='bernoulli'."
        )
    if not fit.glmm.reml:
        raise NotImplementedError(
            f"{what} are not there yet for fits with reml=False, as this one. Fit with reml=True."
        )


def many(adata: AnnData, key: str) -> bool:
    """Is the fit one of many fates?"""
    get.params(adata, key)
    return _keys.RESPONSES in adata.uns[key]


def _check_same(adata: AnnData, key: str, params: Mapping[str, Any], cells: Cells) -> None:
    """The cells that are read now are those of the fit."""
    then = get.effects(adata, key).notna().all(axis=1).to_numpy()
    if int(params["n_cells"]) != len(cells.names) or not np.array_equal(then, cells.kept):
        raise DataError(
            f"the fit was made on {int(params['n_cells'])} cells, and {len(cells.names)} are read now, {int((then & cells.kept).sum())} "
            "of them the same. Go on from the adata that was fitted, or fit this one."
        )


def _model(cells: Cells, params: Mapping[str, Any], device: str | torch.device) -> GLMM:
    return _glmm(cells, params, device).on(
        cells.response,
        cells.design,
        cells.offset,
        trials=cells.trials,
        terms=cells.terms,
        levels=cells.levels,
        response=cells.response_name,
    )


def _glmm(cells: Cells, params: Mapping[str, Any], device: str | torch.device) -> GLMM:
    options = modelling(params)
    lengthscale = float(params["lengthscale"]) if "lengthscale" in params else None
    kernels = [str(params.get(f"{name}_kernel", "")) for name in ("lineage", "spatial")]
    more: dict[str, Any] = {name: bool(params.get(name, False)) for name in ("interaction", "olre")}
    components = components_of(cells, kernels[0], kernels[1], lengthscale, options["rank"], **more)
    return GLMM(str(params["family"]), components, device=device, **options)
