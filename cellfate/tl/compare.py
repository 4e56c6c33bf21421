"""Which components does a fate need? Models with and without them, on the same cells."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate import _keys
from cellfate._runtime import SeedLike, generator, logger
from cellfate.errors import CellfateWarning, DataError
from cellfate.inference.fit import GLMM
from cellfate.inference.hyperposterior import LARGEST_K, too_large
from cellfate.inference.loo import error_of, leave_one_out
from cellfate.io.again import OBJECTS
from cellfate.io.columns import check_adata
from cellfate.io.store import write_table
from cellfate.kernels.base import Component
from cellfate.kernels.groups import Intercepts
from cellfate.kernels.product import Product
from cellfate.tl.components import INTERACTION
from cellfate.tl.fitted import Fitted, check_there, fitted

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

NONE, BOTH = "none", "lineage + spatial"
PAIR = ("lineage", "spatial")
NOTHING = 1e-4  # sd of a component that stands for none


def compare(
    adata: AnnData,
    *,
    interaction: bool = False,
    key: str = _keys.KEY,
    draws: int = 100,
    lineage: Any = None,
    spatial: Any = None,
    graph: Any = None,
    niche: Any = None,
    offset: Any = None,
    trials: Any = None,
    device: str | torch.device = "auto",
    rng: SeedLike | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Compare models without either, with ancestry, with neighborhood, with both, and on demand with their interaction.

    Each is fitted anew to the cells of the fit under `key`, with its other components (groups, niche, ...), fixed effects and priors.
    The evidence integrates over everything and so counts what a component costs; it depends on the priors. Leaving one cell out asks
    whether its relatives and neighbors predict it (Vehtari, Gelman & Gabry 2017). AIC and BIC are those of the free energy at the
    posterior mode, fixed effects integrated out. Where k-hat of leaving cells out is above 0.7, a warning says so.

    Parameters
    ----------
    interaction
        Also look at the model with `lineage:spatial`.
    key
        The `key_added` of the fit.
    draws
        Posterior draws of the hyperparameters behind the prediction of cells left out.
    lineage, spatial, graph, niche, offset, trials
        What was handed to the fit itself, and not the name of something in `adata`, has to be handed over again.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    rng
        Seed of the integrations.
    copy
        Return a copy and leave `adata` as it is.

    Returns
    -------
    `None`, or the copy. Writes a table to `adata.uns[key]["comparison"]`, see :func:`cellfate.get.comparison`.

    Examples
    --------
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(80, family="gaussian", rng=0)
    >>> cf.tl.decompose(adata, "fate", family="gaussian", rng=0)
    >>> cf.tl.compare(adata, rng=0)
    >>> sorted(cf.get.comparison(adata)["model"])
    ['lineage', 'lineage + spatial', 'none', 'spatial']
    """
    check_adata(adata)
    handed = dict(zip(OBJECTS, (lineage, spatial, graph, niche, offset, trials), strict=True))
    fit = fitted(adata, key, handed, device)
    check_there(fit, "comparisons of models")
    stream, rows, each = generator(rng), [], {}
    for name, components in _models(fit, interaction).items():
        glmm, found = _fit(fit, components, stream)
        model, engine, _ = glmm.problem
        loo = leave_one_out(model, engine, glmm.rule, found.draws, count=draws, rng=stream)
        d, each[name] = len(model.parameters), loo.each
        rows.append(
            {
                "model": name,
                "log_evidence": found.log_evidence,
                "elpd_loo": loo.total,
                "aic": 2 * d - 2 * found.free_energy,
                "bic": d * np.log(fit.cells.n) - 2 * found.free_energy,
                "hyperparameters": d,
                "pareto_k": loo.pareto_k,
                "status": _status(found.diagnostics["status"], loo.pareto_k),
            }
        )
        logger.info("%s: log evidence %.2f, elpd of cells left out %.2f", name, found.log_evidence, loo.total)
    table = _table(pd.DataFrame(rows), each)
    rough = table.loc[table["pareto_k"] > LARGEST_K, "model"]
    if len(rough):
        warnings.warn(
            f"elpd_loo of {len(rough)} of {len(table)} models ({', '.join(rough)}) is rough: k-hat of leaving cells out is "
            f"{too_large(float(table['pareto_k'].max()))}. Go by the evidence there, or by larger differences.",
            CellfateWarning,
            stacklevel=2,
        )
    adata = adata.copy() if copy else adata
    write_table(adata, key, _keys.COMPARISON, table)
    return adata if copy else None


def _status(of_fit: str, pareto_k: float) -> str:
    """Doubts about a fit, and about leaving its cells out."""
    if not pareto_k > LARGEST_K:
        return of_fit
    doubt = f"k-hat of leaving cells out is {too_large(pareto_k)}: elpd_loo is rough"
    return doubt if of_fit == "converged" else f"{of_fit}; {doubt}"


def _models(fit: Fitted, interaction: bool) -> dict[str, list[Component]]:
    """Components by the name of the model."""
    own = {c.name: c for c in fit.glmm.components}
    missing = [name for name in PAIR if name not in own]
    if missing:
        raise DataError(
            f"the fit has no component {missing[0]!r}, and nothing to compare. Fit with both, and compare then."
        )
    rest = [c for name, c in own.items() if name not in (*PAIR, INTERACTION)]
    nothing = rest or [Component(NONE, Intercepts(np.arange(fit.cells.n) % 2))]
    pair = [own[name] for name in PAIR]
    models = {NONE: nothing, PAIR[0]: [pair[0], *rest], PAIR[1]: [pair[1], *rest], BOTH: [*pair, *rest]}
    if interaction:
        product = own.get(INTERACTION) or Component(INTERACTION, Product(pair[0].kernel, pair[1].kernel))
        models[f"{BOTH} + {INTERACTION}"] = [*pair, product, *rest]
    return models


def _fit(fit: Fitted, components: Sequence[Component], rng: np.random.Generator) -> tuple[GLMM, Any]:
    glmm, cells = fit.glmm, fit.cells
    names = [c.name for c in components]
    priors = fit.priors_among(names)
    if names == [NONE]:
        priors[f"sd_{NONE}"] = ("fixed", NOTHING)
    options: Mapping[str, Any] = {"link": glmm.family.link, "method": glmm.rule.name, "rank": glmm.rank}
    engine = "auto" if names == [NONE] else glmm.engine_name
    other = GLMM(
        glmm.family.name, components, priors=priors, engine=engine, device=glmm.device, dtype=glmm.dtype, **options
    )
    found = other.fit(
        cells.response,
        cells.design,
        cells.offset,
        trials=cells.trials,
        terms=cells.terms,
        response=cells.response_name,
        rng=rng,
    )
    return other, found


def _table(table: pd.DataFrame, each: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """The best first, with weights and differences."""
    relative = np.exp(table["log_evidence"] - table["log_evidence"].max())
    table.insert(2, "weight", relative / relative.sum())
    best = table.loc[table["elpd_loo"].idxmax(), "model"]
    table.insert(4, "elpd_difference", [float((each[name] - each[best]).sum()) for name in table["model"]])
    table.insert(5, "elpd_error", [error_of(each[name] - each[best]) for name in table["model"]])
    return table.sort_values("log_evidence", ascending=False).reset_index(drop=True)
