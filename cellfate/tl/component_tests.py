"""Is ancestry there at all, given neighborhood? And neighborhood, given ancestry?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellfate import _keys
from cellfate._runtime import SeedLike, generator, logger
from cellfate.engines.choose import choose
from cellfate.errors import DataError, unknown
from cellfate.inference.bootstrap import DRAWABLE, bootstrap
from cellfate.inference.fit import GLMM
from cellfate.inference.locate import locate
from cellfate.inference.score import Null, score_test
from cellfate.io.again import OBJECTS
from cellfate.io.columns import check_adata
from cellfate.io.store import write_table
from cellfate.tl.fitted import Fitted, fitted

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

METHODS = ("score", "bootstrap")
WITHOUT = ("categorical",)


def test_components(
    adata: AnnData,
    components: str | Sequence[str] | None = None,
    *,
    key: str = _keys.KEY,
    method: str = "score",
    n_boot: int = 199,
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
    """Test each component given all others: the model is fitted without it, and its score is looked at.

    An interval of a variance never holds zero, so it is no test. Nor is twice the gain in likelihood a mixture of chi-squares of
    zero and one degree of freedom here: with one tree, or one field, all cells are one dependent cluster. The score of a variance
    is a quadratic form, whose distribution is known (Lin 1997; Zhang & Lin 2003). Where the component has a length-scale, four are
    looked at and combined (Liu & Xie 2020).

    Parameters
    ----------
    components
        Names of components of the fit; all of them by default.
    key
        The `key_added` of the fit.
    method
        ``"score"``; or ``"bootstrap"``, the same p-value held against those of `n_boot` fates drawn from the null model, each with a
        null fit of its own: slower, and right where samples are small.
    lineage, spatial, graph, niche, offset, trials
        What was handed to the fit itself, and not the name of something in `adata`, has to be handed over again.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    rng
        Seed of the bootstrap.
    copy
        Return a copy and leave `adata` as it is.

    Returns
    -------
    `None`, or the copy. Writes a table to `adata.uns[key]["tests"]`, see :func:`cellfate.get.tests`.

    Examples
    --------
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(80, family="gaussian", rng=0)
    >>> cf.tl.decompose(adata, "fate", family="gaussian", rng=0)
    >>> cf.tl.test_components(adata)
    >>> cf.get.tests(adata)["component"].tolist()
    ['lineage', 'spatial']
    """
    check_adata(adata)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if not isinstance(n_boot, int | np.integer) or n_boot < 1:
        raise DataError(f"n_boot is {n_boot!r}, wanted how many fates to draw, such as 199.")
    handed = dict(zip(OBJECTS, (lineage, spatial, graph, niche, offset, trials), strict=True))
    fit = fitted(adata, key, handed, device)
    family = fit.glmm.family
    if family.name in WITHOUT or (method == "bootstrap" and family.kind not in DRAWABLE):
        raise NotImplementedError(
            f"method={method!r} is not there yet for family={family.name!r}. Ask about one fate at a time with family='bernoulli'."
        )
    if not fit.glmm.reml:
        raise NotImplementedError("tests are not there yet for fits with reml=False. Fit with reml=True.")
    rows, stream = [], generator(rng)
    for name in _names(fit, components):
        rest = [c for c in fit.glmm.components if c.name != name and not _goes_by(c, name)]
        (own,) = (c for c in fit.glmm.components if c.name == name)
        null, mode = _null(fit, rest)
        engine, _ = choose("auto", [own], fit.cells.n, device=fit.glmm.device, dtype=fit.glmm.dtype, rank=fit.glmm.rank)
        found = score_test(null, engine, own)
        row = {"component": name, "given": " + ".join(c.name for c in rest), "method": method, "p": found.p}
        if method == "bootstrap":
            p = bootstrap(null, mode, fit.glmm.rule, engine, own, found.p, count=int(n_boot), rng=stream)
            row |= {"p": p, "p_score": found.p}
        logger.info("%s given %s: p = %.3g", name, row["given"], row["p"])
        rows.append(row)
    adata = adata.copy() if copy else adata
    write_table(adata, key, _keys.TESTS, pd.DataFrame(rows))
    return adata if copy else None


def _names(fit: Fitted, components: str | Sequence[str] | None) -> list[str]:
    known = [c.name for c in fit.glmm.components]
    if len(known) < 2:
        raise DataError(
            f"the fit has one component, {known[0]!r}: there is no model without it to hold it against. Fit with a second one, such as "
            "a grouping factor of specimens."
        )
    wanted = known if components is None else [components] if isinstance(components, str) else list(components)
    wrong = [name for name in wanted if name not in known]
    if wrong or not wanted:
        raise DataError(f"components has {wrong or 'no names'}; the fit has {', '.join(known)}.")
    held = [c.name for c in fit.glmm.components if c.name in wanted and c.kernel.holds_variance]
    if held:
        raise NotImplementedError(
            f"a test of {held}, intercepts and slopes that covary, is not there yet. Fit them apart, as '(1 + x || {held[0]})'."
        )
    return wanted


def _goes_by(component: Any, name: str) -> bool:
    """An interaction has no shape of its own without the component that lends it one."""
    return any(parameter.endswith(f"_{name}") for parameter in component.kernel.borrowed)


def _null(fit: Fitted, rest: Sequence[Any]) -> tuple[Null, Any]:
    glmm, cells = fit.glmm, fit.cells
    priors = fit.priors_among([c.name for c in rest])
    options = {"link": glmm.family.link, "method": glmm.rule.name, "engine": glmm.engine_name, "rank": glmm.rank}
    other = GLMM(glmm.family.name, rest, priors=priors, device=glmm.device, dtype=glmm.dtype, **options)  # type: ignore[arg-type]
    other.on(
        cells.response, cells.design, cells.offset, trials=cells.trials, terms=cells.terms, response=cells.response_name
    )
    model, engine, _ = other.problem
    model, engine, mode = locate(model, engine, glmm.rule)
    return Null(model, engine, glmm.rule, mode), mode
