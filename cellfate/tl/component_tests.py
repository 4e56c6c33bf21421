"""Is ancestry there at all, given neighborhood? And neighborhood, given ancestry?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import chi2, false_discovery_control

from cellfate import _keys
from cellfate._runtime import SeedLike, generator, logger, named_generator, one_of_many, out_of_memory, progress
from cellfate.cells import Cells, Coded
from cellfate.engines.base import Engine
from cellfate.engines.choose import choose
from cellfate.errors import DataError, Failure, unknown
from cellfate.inference.bootstrap import DRAWABLE, bootstrap
from cellfate.inference.fit import GLMM
from cellfate.inference.locate import locate
from cellfate.inference.many import chunks
from cellfate.inference.mode import Mode
from cellfate.inference.score import Null, score_test
from cellfate.inference.swaps import swap_test
from cellfate.io.again import OBJECTS
from cellfate.io.columns import check_adata
from cellfate.io.many import Fates
from cellfate.io.store import write_table
from cellfate.kernels.base import Component
from cellfate.model.glmm import Model
from cellfate.tl.fitted import Fitted, check_there, fitted_all
from cellfate.tl.sets import clades, neighborhoods

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

METHODS = ("score", "likelihood_ratio", "bootstrap", "permutation")
SWAPPED = 6  # cells of a set within which they are swapped, on average
MOST_SWAPPED = 8  # of a neighborhood


def test_components(
    adata: AnnData,
    components: str | Sequence[str] | None = None,
    *,
    key: str = _keys.KEY,
    method: str = "score",
    n_boot: int = 199,
    n_perm: int = 999,
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

    An interval of a variance never holds zero, so it is no test. The score of a variance is a quadratic form, whose distribution is
    known (Lin 1997; Zhang & Lin 2003). Where the component has a length-scale, four are looked at and combined (Liu & Xie 2020).

    Parameters
    ----------
    components
        Names of components of the fit; all of them by default.
    key
        The `key_added` of the fit, of one fate or of many.
    method
        ``"score"``. ``"bootstrap"``: the same p-value held against those of `n_boot` fates drawn from the null model, each with a
        null fit of its own: slower, and right where samples are small. ``"permutation"``, for `lineage` and `spatial`: cells swapped
        `n_perm` times in space within small clades, or in the tree within small neighborhoods, which believes in no distribution and
        sees only what is finer than these sets. ``"likelihood_ratio"``: twice the gain in free energy from mode to mode, against half
        a chi-square of one degree of freedom (Self & Liang 1987). That mixture is for many independent specimens, and for components
        without a length-scale: with one tree, or one field, all cells are one dependent cluster, and of absent components 3 to 9 % are
        called at a level of 5 % (`benchmarks/false_positives.py`; the score 5 %, permutation 3 to 5 %).
    n_boot, n_perm
        How many fates to draw, and how often to swap.
    lineage, spatial, graph, niche, offset, trials
        What was handed to the fit itself, and not the name of something in `adata`, has to be handed over again.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    rng
        Seed of the bootstrap and of the swaps.
    copy
        Return a copy and leave `adata` as it is.

    Returns
    -------
    `None`, or the copy. Writes a table to `adata.uns[key]["tests"]`, see :func:`cellfate.get.tests`. Of many fates it has a row for each
    and component, with `q`, the p-value adjusted over the fates (Benjamini & Hochberg 1995).

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
    for argument, value, what in (("n_boot", n_boot, "fates to draw"), ("n_perm", n_perm, "swaps to make")):
        if not isinstance(value, int | np.integer) or value < 1:
            raise DataError(f"{argument} is {value!r}, wanted how many {what}, such as 199.")
    handed = dict(zip(OBJECTS, (lineage, spatial, graph, niche, offset, trials), strict=True))
    fit, fates = fitted_all(adata, key, handed, device)
    family = fit.glmm.family
    check_there(fit, "tests of components")
    if method == "bootstrap" and family.kind not in DRAWABLE:
        raise NotImplementedError(
            f"method='bootstrap' draws fates again, which is not there yet for family={family.name!r}. Take method='score'."
        )
    names = _names(fit, components)
    sets = {name: _sets(fit, name) for name in names} if method == "permutation" else {}
    seed, rows = int(generator(rng).integers(2**63)), []
    for name in names:
        test = _Test(fit, name, method, int(n_boot), int(n_perm), sets.get(name), alone=fates is None)
        for cells in _responses(fit, fates):
            response = cells.response if isinstance(cells, Failure) else cells.response_name
            row = {} if fates is None else {"response": response}
            row |= {"component": name, "given": " + ".join(c.name for c in test.rest), "method": method}
            rows.append(row | test(cells, named_generator(seed, f"{name} {response}")))
    table = pd.DataFrame(rows)
    if fates is None:
        for row in rows:
            logger.info("%s given %s: p = %.3g", row["component"], row["given"], row["p"])
        table = table.drop(columns="status")
    else:
        table = _adjusted(table)
    adata = adata.copy() if copy else adata
    write_table(adata, key, _keys.TESTS, table)
    return adata if copy else None


def _responses(fit: Fitted, fates: Fates | None) -> Iterator[Cells | Failure]:
    """The cells of the fit with each of its fates."""
    if fates is None:
        yield fit.cells
        return
    with progress(total=len(fates.names), desc="tests", unit="response") as bar:
        for part in chunks(len(fates.names), fit.cells.n, "auto"):
            for name, column in zip(fates.names[part], fates.read(part), strict=True):
                if isinstance(column, DataError):
                    yield Failure(name, str(column))
                else:
                    y, levels = (column.y, column.levels) if isinstance(column, Coded) else (column, None)
                    yield replace(fit.cells, response=y, response_name=name, levels=levels)
                bar.update(1)


def _adjusted(table: pd.DataFrame) -> pd.DataFrame:
    """With the p-values of each component adjusted over the fates that were tested."""
    table.insert(table.columns.get_loc("p") + 1, "q", np.nan)
    for name, own in table.groupby("component", sort=False):
        known = own.index[own["p"].notna()]
        if len(known):
            table.loc[known, "q"] = false_discovery_control(table.loc[known, "p"])
        logger.info("%s: %d of %d fates with q < 0.05", name, int((table.loc[known, "q"] < 0.05).sum()), len(own))
    return table


def _sets(fit: Fitted, name: str) -> np.ndarray:
    """Labels (n,) of cells that may be swapped where `name` is tested."""
    cells, held = fit.cells, [c.name for c in fit.glmm.components if c.name != name]
    count = max(cells.n // SWAPPED, 1)
    if name == "spatial" and "lineage" in held and cells.forest is not None and cells.leaf is not None:
        return clades(cells.forest, cells.leaf, count)
    if name == "lineage" and "spatial" in held and cells.coordinates is not None:
        return neighborhoods(cells.coordinates, cells.specimen, MOST_SWAPPED)
    raise NotImplementedError(
        f"method='permutation' is there for 'lineage' and 'spatial', each given the other with positions, not for {name!r} given "
        f"{', '.join(held)}. Take method='score' or 'bootstrap', or name `components`."
    )


def half_chi_square(gain: float) -> float:
    """Tail of an even mixture of chi-squares of zero and one degree of freedom."""
    return float(0.5 * chi2.sf(gain, 1)) if gain > 0 else 1.0


class _Test:
    """The test of one component in any fate of the fit; what does not depend on the fate is made once."""

    def __init__(
        self,
        fit: Fitted,
        name: str,
        method: str,
        n_boot: int,
        n_perm: int,
        sets: np.ndarray | None,
        *,
        alone: bool,
    ) -> None:
        glmm, self._alone = fit.glmm, alone
        self.rest = [c for c in glmm.components if c.name != name and not _goes_by(c, name)]
        (self._own,) = (c for c in glmm.components if c.name == name)
        self._engine, _ = choose("auto", [self._own], fit.cells.n, device=glmm.device, dtype=glmm.dtype, rank=glmm.rank)
        self._null, self._sets = _with_only(fit, self.rest).shared(), sets
        self._method, self._n_boot, self._n_perm = method, n_boot, n_perm
        if method == "likelihood_ratio":  # the null model and the component, without the interactions that go by it
            self._whole = _with_only(fit, [c for c in glmm.components if c is self._own or c in self.rest]).shared()

    def __call__(self, cells: Cells | Failure, rng: np.random.Generator) -> dict[str, Any]:
        """`p`, what it was made from, and `status`."""
        if isinstance(cells, Failure):
            return {"p": np.nan, "status": f"failed: {cells.reason}"}
        if self._alone:
            return self._tested(cells, rng) | {"status": "tested"}
        try:
            with one_of_many():
                return self._tested(cells, rng) | {"status": "tested"}
        except (DataError, ArithmeticError, ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            return {"p": np.nan, "status": f"failed: {error}"}

    def _tested(self, cells: Cells, rng: np.random.Generator) -> dict[str, Any]:
        model, engine, mode = _mode(self._null, cells)
        if self._method == "likelihood_ratio":
            gain = 2 * (_mode(self._whole, cells)[2].free_energy - mode.free_energy)
            return {"p": half_chi_square(gain), "statistic": gain}
        rule = self._null.rule
        null = Null(model, engine, rule, mode)
        if self._sets is not None:
            return {"p": swap_test(null, self._engine, self._own, self._sets, count=self._n_perm, rng=rng)}
        p = score_test(null, self._engine, self._own).p
        if self._method != "bootstrap":
            return {"p": p}
        found = bootstrap(null, mode, rule, self._engine, self._own, p, count=self._n_boot, rng=rng)
        return {"p": found, "p_score": p}


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


def _with_only(fit: Fitted, rest: Sequence[Component]) -> GLMM:
    """The model of the fit with these components only."""
    glmm = fit.glmm
    priors = fit.priors_among([c.name for c in rest])
    options = {"link": glmm.family.link, "method": glmm.rule.name, "engine": glmm.engine_name, "rank": glmm.rank}
    return GLMM(glmm.family.name, rest, priors=priors, device=glmm.device, dtype=glmm.dtype, **options)  # type: ignore[arg-type]


def _mode(glmm: GLMM, cells: Cells) -> tuple[Model, Engine, Mode]:
    """The mode for these cells and their fate, with the model and the engine focused on it."""
    own = glmm.with_priors({})  # one that other fates do not share
    own.on(
        cells.response, cells.design, cells.offset, trials=cells.trials, terms=cells.terms, response=cells.response_name
    )
    model, engine, _ = own.problem
    return locate(model, engine, glmm.rule)
