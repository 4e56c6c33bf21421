"""Thousands of gaussian responses over the same cells, each with hyperparameters of its own, at little more than the cost of a few.

What is dear is shared: whitening along the tree, products of the columns, eigenvalues (:mod:`cellfate.inference.gaussian_tables`).
Each response is then searched and integrated in tables of its own (:mod:`cellfate.inference.gaussian_posterior`). A response for
which the tables are too small is fitted by itself.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cellfate._runtime import announce, logger, named_generator, progress, resolve_device, side_by_side
from cellfate.engines.base import Sites
from cellfate.engines.structured import StructuredEngine
from cellfate.errors import CellfateWarning, DataError
from cellfate.inference.fit import GLMM, GLMMFit
from cellfate.inference.gaussian_posterior import CLOUD, SCOUTS, Cloud, Modes, Posteriors
from cellfate.inference.gaussian_tables import BASE, LARGEST_RATIO, Axis, Grid, Tabulation
from cellfate.inference.hyperposterior import DRAWS, Hyperposterior
from cellfate.inference.importance import effective, pareto_smooth, systematic
from cellfate.inference.locate import PILOT
from cellfate.inference.mode import Mode
from cellfate.inference.report import all_draws, diagnose, doubts_of, fixed_effects, mode_values
from cellfate.kernels.base import Basis, Component, Given
from cellfate.kernels.groups import Intercepts, Slopes
from cellfate.kernels.lineage import LineageKernel
from cellfate.kernels.spatial import SpatialKernel
from cellfate.model.catalog import get_family
from cellfate.model.families import Outcome
from cellfate.model.glmm import Data, Model
from cellfate.model.partition import LATENT, REALIZED, partition, rows
from cellfate.model.priors import parse_prior
from cellfate.trees.forest import examples

ORDERS = (23, 11, 27)  # nodes along the axes of the tables
PILOT_ORDERS = (17, 17, 21)
WIDE_ORDER = 17  # nodes over all length-scales that the data bound
WINDOW = 3.0  # e-folds of length-scales that one set of tables holds, and half of that from one to the next
ASIDE = (3.0, 4.0)  # sds of the pilot's log length-scale below and above its mode that have to be inside
NARROWEST = 0.1  # of that sd, at least
AT_ONCE = 64  # responses searched and integrated together
MEMORY = 8e8  # bytes for tables
MOST_EDGE = 0.005  # of a posterior next to the end of the tables, or the response is fitted by itself
SETTLED = 0.02  # nats that another step of the search may still bring: what is integrated does not depend on it


Window = tuple[float, float] | None  # of length-scales


def can_serve(components: Sequence[Component], *, engine: str = "auto", reml: bool = True) -> str | None:
    """Why this path cannot take a model; None where it can."""
    if engine not in ("auto", "structured"):
        return f"engine={engine!r} was asked for, and many responses at once need 'structured'"
    if not reml:
        return "fixed effects are maximized (reml=False)"
    trees = [c for c in components if isinstance(c.kernel, LineageKernel)]
    others = [c for c in components if not isinstance(c.kernel, LineageKernel)]
    if len(trees) > 1 or len(others) > 1:
        return "it takes one tree and one more component, a spatial field or a grouping factor"
    if any(h.fixed is None for c in trees for h in c.kernel.hyperparameters):
        return f"component {trees[0].name!r} has a hyperparameter of its own to estimate"
    for c in others:
        if isinstance(c.kernel, Given):
            return f"component {c.name!r} is a covariance matrix, which has no structure"
        if isinstance(c.kernel, Intercepts) and len(np.unique(c.kernel.codes)) == c.kernel.n:
            return f"component {c.name!r} is an effect of each cell, which the residual is already"
        if not isinstance(c.kernel, SpatialKernel | Intercepts | Slopes):
            held = {h.name: torch.full((1,), h.lower) for h in c.kernel.hyperparameters}
            free = any(h.fixed is None for h in c.kernel.hyperparameters)
            if free or not isinstance(c.kernel.structure(held, torch.empty(0, dtype=torch.float64)), Basis):
                return f"component {c.name!r} is a {type(c.kernel).__name__}, which is not tabulated yet"
    return None


def fit_gaussian_many(
    components: Sequence[Component],
    design: np.ndarray,
    terms: Sequence[str],
    Y: np.ndarray,
    names: Sequence[str],
    *,
    offset: np.ndarray | None = None,
    priors: Mapping[str, object] | None = None,
    reml: bool = True,
    engine: str = "auto",
    rank: int | None = None,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "float64",
    seed: int = 0,
    chunk_size: int | None = None,
) -> Iterator[GLMMFit]:
    """A fit for each column of Y (n, k), in their order, as :meth:`cellfate.GLMM.fit` gives it for that column alone.

    Posterior means of the fields are not among it: `effects` is empty. Draws depend on `seed` and the response's name, on nothing
    else. Numbers are float64 whatever `dtype`: differences of large sums are taken. At most `chunk_size` columns share tables.
    """
    refused = can_serve(components, engine=engine, reml=reml)
    if refused:
        raise DataError(f"these responses cannot be fitted together: {refused}.")
    work = Together(
        tuple(components), np.asarray(design, float), tuple(terms), offset, dict(priors or {}), rank, device
    )
    size = chunk_size or work.affordable(Y.shape[1])
    with progress(total=Y.shape[1], desc="responses", unit="response") as bar:
        for first in range(0, Y.shape[1], size):
            some = slice(first, first + size)
            for fit in work.fits(np.asarray(Y[:, some], dtype=np.float64), list(names[some]), seed, engine):
                bar.update(1)
                yield fit


@dataclass(eq=False)
class Together:
    """The model of all responses, and what was made for some of them and can be used again.

    design: (n, p), its columns `terms`; offset: (n,) or None.
    """

    components: tuple[Component, ...]
    design: np.ndarray
    terms: tuple[str, ...]
    offset: np.ndarray | None
    priors: dict[str, object]
    rank: int | None
    device: torch.device | str

    def __post_init__(self) -> None:
        self.on = resolve_device(self.device)
        self.n = self.components[0].kernel.n
        self._tabulations: dict[Window, Tabulation] = {}
        self._windows: list[Window] = []
        self._alone: GLMM | None = None
        self.lineage = next((c.name for c in self.components if isinstance(c.kernel, LineageKernel)), "")
        self.columns = next((c.name for c in self.components if not isinstance(c.kernel, LineageKernel)), "")
        free = [h.fixed is None for c in self.components if c.name == self.columns for h in c.kernel.hyperparameters]
        held = f"lengthscale_{self.columns}"
        fixed = held in self.priors and isinstance(parse_prior(held, self.priors[held]), float)
        self.lengthscale = held if any(free) and not fixed else ""

    def affordable(self, count: int) -> int:
        """Responses whose tables fit in memory."""
        nodes = math.prod(ORDERS if self.lengthscale else (ORDERS[0], 1, ORDERS[2]))
        return max(64, min(count, int(MEMORY / (8 * nodes * (1 + self.design.shape[1])))))

    def model(self, y: np.ndarray) -> Model:
        like = torch.zeros(self.n, dtype=torch.float64)
        known = like if self.offset is None else torch.as_tensor(np.asarray(self.offset, dtype=np.float64))
        data = Data(Outcome(torch.as_tensor(y)), torch.as_tensor(self.design), self.terms, known)
        return Model(get_family("gaussian", None), self.components, data, self.priors, True)

    def fits(self, Y: np.ndarray, names: list[str], seed: int, engine: str) -> Iterator[GLMMFit]:
        """Those of one chunk, in order."""
        began = time.perf_counter()
        models = [self.model(np.ascontiguousarray(y)) for y in Y.T]
        waiting: dict[Window, list[int]] = {}
        for j, window in enumerate(self.windows(models, Y)):
            waiting.setdefault(window, []).append(j)
        found: dict[int, GLMMFit] = {}
        beyond: list[int] = []  # the end of the tables
        while waiting:  # windows rise, and a response that one of them does not hold is looked for in the next
            window = min(waiting, key=lambda w: w or (0.0, 0.0))
            index = np.array(waiting.pop(window))
            for i, fit in self._within(window, index, models, Y, names, seed):
                if fit is not None:
                    found[i] = fit
                elif (above := self._above(window)) is not None:
                    waiting.setdefault(above, []).append(i)
                else:
                    beyond.append(i)
            logger.debug(
                "%d responses, length-scales within %s: %.1f s", len(index), window, time.perf_counter() - began
            )
        if beyond:
            said = examples(np.array(names, dtype=object)[beyond])
            announce("%d responses are fitted by themselves, beyond the end of the tables: %s", len(beyond), said)
            whole = self.whole(engine)
            fits = side_by_side(lambda i: self.alone(whole, Y[:, i], names[i], seed), beyond, self.on)
            found |= dict(zip(beyond, fits, strict=True))
        spent = (time.perf_counter() - began) / len(names)
        for j in range(len(names)):
            fit = found.pop(j)
            fit.diagnostics["seconds"] = fit.diagnostics.get("seconds") or spent
            yield fit

    def _within(
        self, window: Window, index: np.ndarray, models: list[Model], Y: np.ndarray, names: list[str], seed: int
    ) -> Iterator[tuple[int, GLMMFit | None]]:
        """Fits of some responses in the tables of a window; None for one that these do not hold."""
        index = np.sort(index)
        mine = [models[i] if window is None else models[i].within({self.lengthscale: window}) for i in index]
        posteriors, modes = self.located(window, mine, Y[:, index])
        engine = self._tabulations[window].engine
        for start in range(0, len(index), AT_ONCE):
            some = np.arange(start, min(start + AT_ONCE, len(index)))
            streams = [named_generator(seed, names[index[i]]) for i in some]
            here = _some_of(modes, some)
            cloud = posteriors.cloud(some, here, streams)
            held = (cloud.edge <= MOST_EDGE) & (here.gain <= SETTLED) & np.isfinite(here.log_posterior)
            for k, i in enumerate(some):
                name = names[index[i]]
                fit = _assembled(posteriors, int(i), k, here, cloud, streams[k], name, engine) if held[k] else None
                yield int(index[i]), fit

    def _above(self, window: Window) -> Window:
        """The next of the windows that overlap; None at the end."""
        if window not in self._windows[:-1]:
            return None
        return self._windows[self._windows.index(window) + 1]

    def whole(self, engine: str) -> GLMM:
        """The model of a response that is fitted by itself."""
        kind = "structured" if self.rank is not None else engine
        if self._alone is None:
            glmm = GLMM("gaussian", self.components, priors=self.priors, engine=kind, rank=self.rank, device=self.on)
            self._alone = glmm.shared()
        return self._alone

    def alone(self, whole: GLMM, y: np.ndarray, name: str, seed: int) -> GLMMFit:
        fit = whole.with_priors({}).fit(  # a copy of the model, which others do not share
            y, self.design, self.offset, terms=self.terms, response=name, rng=named_generator(seed, name)
        )
        components, shares = (
            {k: _not_realized(table, x) for k, x in table.items()} for table in (fit.components, fit.shares)
        )
        return replace(fit, components=components, shares=shares, effects={})  # what its company has

    # -- where to look -------------------------------------------------------------------------------------------------

    def located(self, window: Window, models: list[Model], Y: np.ndarray) -> tuple[Posteriors, Modes]:
        """Posteriors of some responses over the length-scales of a window, and their modes."""
        if window not in self._tabulations:
            wide = window is not None and math.log(window[1] / window[0]) > 1.01 * WINDOW
            self._tabulations[window] = self.tabulation(self.components, self.n, window, wide)
        tabulation = self._tabulations[window]
        y, scale, level = self.standardized(models, Y, tabulation.design)
        posteriors = Posteriors(
            models, tabulation.tabulate(y), scale, level, (self.lineage, self.columns, self.lengthscale)
        )
        return posteriors, _in_parts(posteriors, len(models))

    def tabulation(self, components: tuple[Component, ...], n: int, window: Window, wide: bool) -> Tabulation:
        ranges = {} if window is None else {self.columns: window}
        engine = StructuredEngine(components, n, device=self.on, dtype=torch.float64, rank=self.rank, ranges=ranges)
        order = WIDE_ORDER if wide else ORDERS[1]
        grid = self.grid(window, (ORDERS[0], order, ORDERS[2]))
        return Tabulation(engine, components, torch.as_tensor(self.design).to(engine.like), grid)

    def grid(self, window: Window, orders: tuple[int, int, int]) -> Grid:
        none = Axis.between(0.0, 0.0, 1, BASE)
        lineage = Axis.between(0.0, LARGEST_RATIO, orders[0], BASE) if self.lineage else none
        columns = Axis.between(0.0, LARGEST_RATIO, orders[2], BASE) if self.columns else none
        if window is None:
            held = self.model(np.arange(self.n, dtype=float))._fixed.get(f"lengthscale_{self.columns}", 1.0)
            return Grid(lineage, Axis(np.array([math.log(held)])), columns)
        return Grid(lineage, Axis.between(*window, orders[1]), columns)

    def standardized(self, models: list[Model], Y: np.ndarray, like: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Responses (n, k) in units of their spread, without what the fixed effects explain at least squares, and both of these."""
        scale = np.array([model.response_scale for model in models])
        y = (Y if self.offset is None else Y - np.asarray(self.offset)[:, None]) / scale
        design = models[0].data.design.numpy()
        if not design.shape[1]:
            return torch.as_tensor(y).to(like), scale, np.zeros((y.shape[1], 0))
        inverse = np.linalg.pinv(design)
        level = np.array(
            [inverse @ column for column in np.ascontiguousarray(y.T)]
        )  # each by itself, to the last digit
        return (
            torch.as_tensor(y - sum(np.outer(x, b) for x, b in zip(design.T, level.T, strict=True))).to(like),
            scale,
            level,
        )

    def windows(self, models: list[Model], Y: np.ndarray) -> list[Window]:
        """For each response the length-scales that matter to it, from a few fixed windows, by a fit of some of the cells."""
        if not self.lengthscale:
            return [None] * len(models)
        (own,) = (p for p in models[0].parameters if p.name == self.lengthscale)
        whole = (own.lower, own.upper)
        low, high = math.log(own.lower), math.log(own.upper)
        if high - low <= WINDOW:
            return [whole] * len(models)
        cells = models[0].data.some(PILOT)
        first = models[0].at(cells)
        thin = [model.at(cells, first.components) for model in models]
        engine = StructuredEngine(self.components, self.n, device=self.on, dtype=torch.float64, rank=self.rank)
        small = engine.pilot(thin[0].components, cells)
        small.ranges = {self.columns: whole}
        design = torch.as_tensor(self.design[cells]).to(small.like)
        tabulation = Tabulation(small, tuple(thin[0].components), design, self.grid(whole, PILOT_ORDERS))
        part = Together(
            tuple(thin[0].components),
            self.design[cells],
            self.terms,
            _at(self.offset, cells),
            self.priors,
            None,
            self.on,
        )
        y, scale, level = part.standardized(thin, Y[cells], design)
        posteriors = Posteriors(
            thin, tabulation.tabulate(y), scale, level, (self.lineage, self.columns, self.lengthscale)
        )
        modes = _in_parts(posteriors, len(models))
        place = [p.name for p in models[0].parameters].index(self.lengthscale)
        unit = posteriors.unit(np.arange(len(models)))
        values, vectors = np.linalg.eigh(modes.curvature * unit[:, :, None] * unit[:, None, :])
        spread = np.sqrt(((vectors[:, place] ** 2) / np.clip(values, 1 / 9, None)).sum(-1)).clip(min=NARROWEST)
        steps = math.ceil((high - low - WINDOW) / (WINDOW / 2))
        begins = np.linspace(low, high - WINDOW, steps + 1)
        self._windows = [(math.exp(begin), math.exp(begin + WINDOW)) for begin in begins]
        out: list[Window] = []
        for x, sd in zip(modes.u[:, place], spread, strict=True):
            down, up = max(x - ASIDE[0] * sd, low), min(x + ASIDE[1] * sd, high)
            fits = (begins <= down + 1e-9) & (begins + WINDOW >= up - 1e-9)
            if not fits.any():
                out.append(whole)
                continue
            apart = np.where(fits, np.abs(begins + WINDOW / 2 - (down + up) / 2), np.inf)
            out.append(self._windows[int(np.argmin(apart))])
        return out


def _at(x: np.ndarray | None, cells: np.ndarray) -> np.ndarray | None:
    return None if x is None else np.asarray(x)[cells]


def _in_parts(posteriors: Posteriors, count: int) -> Modes:
    parts = []
    for first in range(0, count, AT_ONCE):
        some = np.arange(first, min(first + AT_ONCE, count))
        parts.append(posteriors.modes(some))

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(p, name) for p in parts])

    names = ("u", "log_posterior", "log_prior", "curvature", "gain", "steps")
    return Modes(**{name: joined(name) for name in names})


def _some_of(modes: Modes, some: np.ndarray) -> Modes:
    return Modes(
        modes.u[some],
        modes.log_posterior[some],
        modes.log_prior[some],
        modes.curvature[some],
        modes.gain[some],
        modes.steps[some],
    )


def _assembled(
    posteriors: Posteriors,
    i: int,
    k: int,
    modes: Modes,
    cloud: Cloud,
    rng: np.random.Generator,
    name: str,
    engine: StructuredEngine,
) -> GLMMFit:
    """The fit of response `i`, the `k`-th of those that were integrated together."""
    model = posteriors.models[i]
    log_ratio = cloud.log_ratio[k]
    log_evidence = float(np.logaddexp.reduce(log_ratio) - np.log(len(log_ratio)))
    log_weight, pareto_k = pareto_smooth(log_ratio)
    chosen = systematic(np.exp(log_weight), DRAWS, rng)[rng.permutation(DRAWS)]
    used, back = np.unique(chosen, return_inverse=True)
    mean, factor = posteriors.beta(i, cloud.own_variance[k, used], cloud.forms[k, used])
    beta = mean[back] + (factor[back] @ rng.standard_normal((DRAWS, mean.shape[1], 1)))[..., 0]
    theta = model.theta(torch.as_tensor(cloud.u[k, chosen]))
    values = {key: value.numpy() for key, value in theta.values.items()}
    posterior = Hyperposterior(
        values=values,
        beta=beta,
        effects={},
        realized={},
        log_evidence=log_evidence,
        pareto_k=float(pareto_k),
        interpolation_error=math.nan,  # of the tables it is not known response by response
        effective_draws=effective(log_weight),
        evaluations=SCOUTS + CLOUD,
        unsettled=0,
    )
    mode = _mode(posteriors, i, k, modes)
    scales = {scale: part for scale, part in partition(model, values, beta, {}).items() if part}
    tables = rows(model, name, scales, values)
    found, approximate = engine.report({key: float(x.mean()) for key, x in values.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellfateWarning)  # thousands of them; each is in its fit's status
        diagnostics = diagnose(mode, posterior, scales[LATENT], doubts_of(mode, posterior, scales[LATENT], approximate))
    diagnostics |= {"engine": engine.name, "engine_reason": "structured: many gaussian responses at once", **found}
    return GLMMFit(
        components=tables[0],
        shares=tables[1],
        fixed_effects=fixed_effects(posterior, model.data.terms),
        draws=all_draws(posterior, model.data.terms, scales[LATENT]),
        effects={},
        mode=mode_values(model, mode),
        free_energy=mode.free_energy,
        log_evidence=log_evidence,
        diagnostics=diagnostics,
    )


def _not_realized(table: Mapping[str, list], column: list) -> list:
    return [x for x, scale in zip(column, table["scale"], strict=True) if scale != REALIZED]


def _mode(posteriors: Posteriors, i: int, k: int, modes: Modes) -> Mode:
    u, none = torch.as_tensor(modes.u[k]), torch.empty(0, dtype=torch.float64)
    low, high = posteriors.bounds(np.array([i]))
    at_bound = tuple(
        p.name
        for p, x, a, b in zip(posteriors.parameters[i], modes.u[k], low[0], high[0], strict=True)
        if p.scale != "sd" and (x - a < 1e-3 or b - x < 1e-3)
    )
    return Mode(
        u=u,
        free_energy=float(modes.log_posterior[k] - modes.log_prior[k]),
        log_posterior=float(modes.log_posterior[k]),
        curvature=torch.as_tensor(modes.curvature[k]),
        sites=Sites(none, none),
        mean=none,
        log_variance=none,
        mean_slope=none,
        log_variance_slope=none,
        at_bound=at_bound,
        evaluations=int(modes.steps[k]),
        converged=True,
        message="converged",
    )
