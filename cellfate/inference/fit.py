"""The model on arrays: build, fit, evaluate. `cf.tl.decompose` is this with an AnnData around it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cellfate._runtime import SeedLike, announce, generator, out_of_memory, resolve_device, resolve_dtype
from cellfate.engines.base import Engine
from cellfate.engines.choose import ENGINES, NOT_YET, SHARE_OF_MEMORY, choose, free_memory
from cellfate.engines.dense import DenseEngine
from cellfate.errors import CellfateWarning, DataError, unknown
from cellfate.inference import fates
from cellfate.inference.arrays import check_single_cells, checked_priors, named_components, numbers, term_names
from cellfate.inference.free_energy import evaluate, log_evidence
from cellfate.inference.hyperposterior import integrate
from cellfate.inference.locate import locate
from cellfate.inference.predict import Ask, Draws, Predicted, focused, predict
from cellfate.inference.report import GLMMFit, Integrated, report
from cellfate.inference.sites import RULES, Rule, Variational
from cellfate.inference.variational_laplace import Status
from cellfate.kernels.base import Component, Kernel
from cellfate.model.checks import (
    check_design,
    check_log_offset,
    check_response,
    find_family,
    warn_of_two_values,
)
from cellfate.model.families import Outcome
from cellfate.model.glmm import Data, Model

EXACT = 1e-8  # of site updates at given hyperparameters


@dataclass(frozen=True)
class Evaluated:
    """The model at given hyperparameters; leading dimension where several points were given.

    mean, variance: (n,) posterior of the latent field, fixed effects and offset included in the mean.
    """

    free_energy: Any
    mean: np.ndarray
    variance: np.ndarray
    status: str


class GLMM:
    """Generalized linear mixed model with structured covariances, on arrays.

    Parameters
    ----------
    family, link
        As in :func:`cellfate.tl.decompose`.
    components
        Name -> kernel (:mod:`cellfate.kernels`) or covariance matrix (n, n), which is scaled so that its variance is the one
        expected among these cells; or a list of :class:`cellfate.kernels.Component`. The names of ancestry and neighborhood
        are `lineage` and `spatial`; `fixed`, `residual`, `distribution` and `shared` are rows of the tables.
    priors
        See :func:`cellfate.tl.decompose`.
    reml
        Integrate the fixed effects out; otherwise they are maximized with the hyperparameters.
    method
        ``"variational"``, ``"laplace"`` or ``"ep"``.
    engine, rank
        ``"auto"``, ``"dense"`` (exact) or ``"structured"`` (linear in the cells: exact along the tree, a spatial field by `rank`
        columns, as many as it needs by default).
    device, dtype
        Where and in what to compute: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:<number>"``; ``"float64"`` or ``"float32"``.
        Tensors are taken from any device.
    per_fate
        For ``"categorical"``: a variance of each component for every fate, `lineage[<fate>]` and so on, in place of a shared one.
        Length-scales stay shared. Needs the dense engine, over pairs of fates times cells.

    Examples
    --------
    >>> import numpy as np
    >>> import cellfate as cf
    >>> from cellfate.kernels import Matern32
    >>> rng = np.random.default_rng(0)
    >>> sisters = np.kron(np.eye(15), np.ones((4, 4)))  # families of four: a covariance matrix
    >>> positions = rng.normal(size=(60, 2))
    >>> y = 3 + np.repeat(rng.normal(size=15), 4) + 0.5 * rng.normal(size=60)
    >>> glmm = cf.GLMM("gaussian", {"lineage": sisters, "spatial": Matern32(positions)})
    >>> fit = glmm.fit(y, np.ones((60, 1)), terms=["Intercept"], rng=0)
    >>> fit.shares["component"][:3]
    ['lineage', 'spatial', 'residual']
    >>> sorted(fit.mode)
    ['lengthscale_spatial', 'variance_lineage', 'variance_residual', 'variance_spatial']
    """

    def __init__(
        self,
        family: str,
        components: Mapping[str, Kernel | np.ndarray | torch.Tensor] | Sequence[Component],
        *,
        link: str | None = None,
        priors: Mapping[str, object] | None = None,
        reml: bool = True,
        method: str = "variational",
        engine: str = "auto",
        rank: int | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float64",
        per_fate: bool = False,
    ) -> None:
        self.family = find_family(family, link)
        self.device, self.dtype = resolve_device(device), resolve_dtype(dtype)
        self.components = named_components(components, self.device)
        self.priors, self.reml = checked_priors(priors, self.components), reml
        self.rule = _rule(method)
        self.per_fate = per_fate
        if per_fate and self.family.kind != fates.KIND:
            raise DataError(
                f"per_fate=True goes with family='categorical', not {family!r}: it has a single field of each component."
            )
        if engine not in (*ENGINES, *NOT_YET):
            raise unknown("engine", engine, ENGINES)
        self.engine_name, self.rank = engine, rank
        self._decided: tuple[str, str] | None = None  # an engine and why, where that is not to be decided again
        self._engine: tuple[Engine, str, tuple[Any, ...]] | None = None  # and for what it was made
        self._problem: tuple[Model, Engine, str] | None = None

    def fit(
        self,
        y: Any,
        X: Any = None,
        offset: Any = None,
        *,
        trials: Any = None,
        terms: Sequence[str] | None = None,
        levels: Sequence[str] | None = None,
        response: str = "y",
        rng: SeedLike | None = None,
    ) -> GLMMFit:
        """Estimate the hyperparameters and partition the variance.

        y: (n,), 0 and 1 for bernoulli, 0 to K - 1 for ordinal and categorical; for the latter also counts or probabilities (n, K).
        levels: names of the K fates of categorical, for effects and tables. X: (n, p) fixed effects with `terms` as the names of its columns; None means none, not
        even an intercept: for one, give a column of ones. offset: (n,), known, on link scale. trials: (n,) or one number, for
        binomial. response: what to call y in tables and messages. Warns where the answer is not to be trusted; the reasons
        are in `diagnostics`.
        """
        began = time.perf_counter()
        found = self.posterior(y, X, offset, trials=trials, terms=terms, levels=levels, response=response, rng=rng)
        fit = report(found, response)
        fit.diagnostics["seconds"] = time.perf_counter() - began
        return fit

    def posterior(
        self,
        y: Any,
        X: Any = None,
        offset: Any = None,
        *,
        trials: Any = None,
        terms: Sequence[str] | None = None,
        levels: Sequence[str] | None = None,
        response: str = "y",
        rng: SeedLike | None = None,
    ) -> Integrated:
        """What :meth:`fit` reports, before it is reported; the same arguments."""
        model, engine, why = self._problem = self._build(y, X, offset, trials, terms, response, levels)
        announce("%s", why)
        try:
            model, engine, mode = locate(model, engine, self.rule)
            posterior = integrate(model, engine, self.rule, mode, generator(rng))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise MemoryError(
                f"{model.data.n} cells do not fit into the memory of {self.device} ({why}). Use engine='structured' with a smaller "
                "`rank`, dtype='float32', fewer cells, or a larger machine; nothing was written."
            ) from error
        self._problem = model, engine, why
        found, approximate = engine.report({name: float(x.mean()) for name, x in posterior.values.items()})
        facts = {"engine": engine.name, "engine_reason": why, **found}
        return Integrated(model, mode, posterior, terms, levels, approximate, facts)

    def evaluate(
        self,
        theta: Mapping[str, Any],
        y: Any = None,
        X: Any = None,
        offset: Any = None,
        *,
        trials: Any = None,
        method: str | None = None,
    ) -> Evaluated:
        """Free energy and posterior of the latent field at fixed hyperparameters.

        theta: natural values by name, such as ``{"variance_lineage": 1.0, "lengthscale_spatial": 0.6}``, each a number or
        (points,); `beta` (p,) too where `reml=False`. Without `y` the data of the last :meth:`fit` or :meth:`evaluate` is used.
        """
        if y is not None:
            self._problem = self._build(y, X, offset, trials, None)
        if self._problem is None:
            raise DataError("there is no data yet: give y (and X, offset), or call fit first.")
        model, engine, _ = self._problem
        rule = self.rule if method is None else _rule(method)
        at, points = model.from_natural(theta)
        here = evaluate(model, focused(engine, at), at, rule, tolerance=EXACT)
        worst = Status(int(here.fit.status.max()))
        if worst is not Status.CONVERGED:
            warnings.warn(f"free energy: {worst.sentence}.", CellfateWarning, stacklevel=2)
        free_energy = log_evidence(model, here, rule).cpu().numpy()
        mean = (here.posterior.mean + model.shift(at)).cpu().numpy()
        variance = here.posterior.variance.cpu().numpy()
        if self.family.kind == fates.KIND:
            form = fates.Form.of(model)
            mean, variance = form.by_fate(mean), form.variances_by_fate(variance)
        if points == 1:
            return Evaluated(float(free_energy[0]), mean[0], variance[0], worst.sentence)
        return Evaluated(free_energy, mean, variance, worst.sentence)

    def on(
        self,
        y: Any,
        X: Any = None,
        offset: Any = None,
        *,
        trials: Any = None,
        terms: Sequence[str] | None = None,
        levels: Sequence[str] | None = None,
        response: str = "y",
    ) -> GLMM:
        """The model with the data of an earlier fit, whose draws :meth:`ancestors` and :meth:`elsewhere` are then given."""
        self._problem = self._build(y, X, offset, trials, terms, response, levels)
        return self

    def ancestors(
        self, draws: GLMMFit | Draws, component: str = "lineage", *, count: int = 16, rng: SeedLike | None = None
    ) -> Predicted:
        """Posterior of a lineage component at every node of its forest, leaves without a cell included.

        draws: the last fit, or its `draws`. The mean of `count` of them, spread over all, each with its own Gaussian posterior.
        """
        return self._predict(draws, component, lambda here, term: here.ancestors(term), count, rng)

    def elsewhere(
        self,
        draws: GLMMFit | Draws,
        coordinates: Any,
        specimen: Any = None,
        component: str = "spatial",
        *,
        count: int = 16,
        rng: SeedLike | None = None,
    ) -> Predicted:
        """Posterior of a spatial field at new positions (k, 2 or 3) in the specimens (k,), coded as the kernel does.

        Far from all cells, and in a specimen without any, it is the prior. The rest as in :meth:`ancestors`.
        """
        where = numbers("coordinates", coordinates, 2)
        codes = np.zeros(len(where), dtype=np.int64) if specimen is None else np.asarray(specimen)
        kernels = {c.name: c.kernel for c in self.components}
        wanted = np.shape(getattr(kernels.get(component), "coordinates", where))[1]
        if where.shape[1] != wanted or codes.shape != where.shape[:1]:
            raise DataError(
                f"coordinates have shape {where.shape} and specimens {codes.shape}, wanted (k, {wanted}), as the cells have, and "
                "(k,)."
            )
        return self._predict(draws, component, lambda here, term: here.elsewhere(term, where, codes), count, rng)

    @property
    def reason(self) -> str:
        """Why the engine is the one it is."""
        return self._chosen(self.components, self.components[0].kernel.n)[1]

    @property
    def problem(self) -> tuple[Model, Engine, str]:
        """The model over the data of the last call, its engine, and why that one."""
        if self._problem is None:
            raise DataError("there is no data yet: call fit first, or `on` with the data of an earlier fit.")
        return self._problem

    def _predict(self, draws: GLMMFit | Draws, component: str, ask: Ask, count: int, rng: SeedLike | None) -> Predicted:
        model, engine, _ = self.problem
        if self.family.kind == fates.KIND:
            raise NotImplementedError(
                "effects of ancestors and at new positions are not there yet for family='categorical'; ask about one fate at a time "
                "with family='bernoulli'."
            )
        found = draws.draws if isinstance(draws, GLMMFit) else draws
        return predict(model, engine, self.rule, found, component, ask, count=count, rng=generator(rng))

    def _build(
        self,
        y: Any,
        X: Any,
        offset: Any,
        trials: Any,
        terms: Sequence[str] | None,
        response: str = "y",
        levels: Sequence[str] | None = None,
    ) -> tuple[Model, Engine, str]:
        kind = self.family.kind
        if kind == fates.KIND:
            return self._build_fates(y, X, offset, trials, terms, response, levels)
        response_ = numbers(response, y, 1)
        n = len(response_)
        rows_ = np.arange(n)  # how cells are called in a message
        if kind == "successes" and trials is None:
            raise DataError("family 'binomial' needs `trials`, the number of trials behind each y.")
        if kind != "successes" and trials is not None:
            raise DataError(
                f"trials was given, but family {self.family.name!r} has none; leave it out or use 'binomial'."
            )
        total = None if trials is None else numbers("trials", trials, 1, n)
        check_response(response_, rows_, response, kind=kind, trials=total)
        check_single_cells(self.components, self.family, total)
        design = np.zeros((n, 0)) if X is None else numbers("X", X, 2, n)
        names = term_names(terms, design.shape[1])
        if names:
            check_design(design, names, rows_, "X")
        known = np.zeros(n) if offset is None else numbers("offset", offset, 1, n)
        if kind == "count":
            check_log_offset(known, "offset")
            warn_of_two_values(response_, response, self.family.name)
        count = int(response_.max()) + 1 if kind == "levels" else None
        outcome = Outcome(self._tensor(response_), None if total is None else self._tensor(total), count)
        data = Data(outcome, self._tensor(design), names, self._tensor(known))
        model = Model(self.family, self.components, data, self.priors, self.reml)
        return model, *self._chosen(self.components, n)

    def _build_fates(
        self,
        y: Any,
        X: Any,
        offset: Any,
        trials: Any,
        terms: Sequence[str] | None,
        response: str,
        names: Sequence[str] | None,
    ) -> tuple[Model, Engine, str]:
        if not self.reml or not isinstance(self.rule, Variational):
            raise NotImplementedError(
                "family='categorical' is there with method='variational' and reml=True only; ask about one fate at a time with "
                "family='bernoulli' for others."
            )
        if trials is not None or (offset is not None and np.any(offset)):
            raise DataError(
                "family='categorical' takes no trials (give a matrix of counts) and no offset, which all fates would share."
            )
        check_single_cells(self.components, self.family, None)
        weights = fates.weights_of(response, y)
        n, levels = weights.shape
        rows_ = np.arange(n)
        design = np.zeros((n, 0)) if X is None else numbers("X", X, 2, n)
        terms_ = term_names(terms, design.shape[1])
        if terms_:
            check_design(design, terms_, rows_, "X")
        each = fates.fate_names(names, levels) if self.per_fate else None
        priors = fates.priors_by_fate(self.components, each, self.priors) if each else self.priors
        form, components, engine, why = self._form(levels, each, n)
        seen, total = form.outcome(weights)
        outcome = Outcome(self._tensor(seen), self._tensor(total), levels)
        x, terms_ = form.design(design, terms_)
        nothing = self._tensor(np.zeros(len(seen)))
        data = Data(outcome, self._tensor(x), terms_, nothing, form.copies, levels - 1)
        return Model(form.family, components, data, priors, True), engine, why

    def _form(
        self, levels: int, each: Sequence[str] | None, n: int
    ) -> tuple[fates.Form, tuple[Component, ...], Engine, str]:
        """Fates by contrasts or by all pairs, the components over the copies, their engine and why it is that one.

        each: names of the fates, where they have variances of their own. Contrasts would depend on each other then.
        """
        form = fates.Form(levels, paired=True)
        alone = each is not None or fates.only_paired(self.components)
        if alone or (
            self.engine_name != "structured" and self.rank is None and fates.can_be_paired(self.components, levels)
        ):
            components, size = form.components(self.components, each), form.copies * n
            dense = DenseEngine(components, size, device=self.device, dtype=self.dtype)
            small = dense.blocks.largest <= fates.WHOLE and dense.blocks.entries <= fates.ENTRIES
            if alone or (small and dense.bytes_per_point() <= SHARE_OF_MEMORY * free_memory(self.device)):
                engine, why = self._chosen(components, size, form)
                return form, components, engine, f"{why}: {n} cells by {form.copies} pairs of fates"
        form = fates.Form(levels)
        components = form.components(self.components, None)
        return form, components, *self._chosen(components, form.copies * n, form)

    def _chosen(self, components: Sequence[Component], n: int, form: fates.Form | None = None) -> tuple[Engine, str]:
        made_for = (n, tuple(c.name for c in components), form)
        if self._engine is None or self._engine[2] != made_for:
            name, why = self._decided or (self.engine_name, "")
            engine, because = choose(name, components, n, device=self.device, dtype=self.dtype, rank=self.rank)
            self._engine = engine, why or because, made_for
        return self._engine[:2]

    def plain(self, device: str | torch.device | None = None) -> GLMM:
        """The same model as plain data, which pickles, with its engine decided: by how much memory a worker has, it may not depend.

        `device`: where it will be fitted, which need not be here.
        """
        other = copy(self)
        if self.family.kind != fates.KIND:  # there, it goes by how many fates there are
            engine, why = self._chosen(self.components, self.components[0].kernel.n)
            other._decided = engine.name, why
        other._engine = other._problem = None
        other.device = self.device if device is None else torch.device(device)
        return other

    def with_priors(self, priors: Mapping[str, object]) -> GLMM:
        """The same model with these priors in place of its own where they are of one name; what is made for one serves both."""
        other = copy(self)
        other.priors, other._problem = checked_priors({**self.priors, **priors}, self.components), None
        return other

    def with_components(self, components: Sequence[Component]) -> GLMM:
        """The same model of other components of the same names, such as ancestry by another tree."""
        other = copy(self)
        other.components, other._engine, other._problem = named_components(components, self.device), None, None
        other._decided = None
        return other

    def shared(self) -> GLMM:
        """The same model for several responses of its cells, which keeps what one may take over from another."""
        other = copy(self)
        engine, why = self._chosen(self.components, self.components[0].kernel.n)
        assert self._engine is not None
        other._engine, other._problem = (engine.shared(), why, self._engine[2]), None
        return other

    def _tensor(self, x: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(x).to(self.device, self.dtype)


def _rule(method: str) -> Rule:
    if method not in RULES:
        raise unknown("method", method, sorted(RULES))
    return RULES[method]()
