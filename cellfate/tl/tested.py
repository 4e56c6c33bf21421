"""The job of testing components: one of them in one fate, or in many, or in fates drawn from the null model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import chi2

from cellfate._runtime import named_generator, one_of_many, out_of_memory
from cellfate.cells import Cells, Coded
from cellfate.distributed.tasks import Job, Work
from cellfate.engines.base import Engine
from cellfate.engines.choose import choose
from cellfate.errors import DataError, Failure
from cellfate.inference.bootstrap import bootstrapped, draw_seeds, null_p_values
from cellfate.inference.fit import GLMM
from cellfate.inference.locate import locate
from cellfate.inference.many import Column
from cellfate.inference.mode import Mode
from cellfate.inference.score import Null, score_test
from cellfate.inference.swaps import swap_test
from cellfate.kernels.base import Component
from cellfate.model.glmm import Model
from cellfate.tl.fitted import Fitted


@dataclass(frozen=True, eq=False)
class Asked:
    """A component to be tested, in these fates (None: the one of the fit). With `seeds`: in fates of the null model instead."""

    component: str
    names: tuple[str, ...] | None = None
    columns: tuple[Column, ...] = ()
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class TestJob(Job):
    """Tests of components. An :class:`Asked` is answered by rows of a table, one with seeds by a p-value for each.

    sets: labels (n,) of cells that may be swapped, by component. seed: random numbers go by it, the component and the fate.
    """

    fit: Fitted
    method: str
    n_boot: int
    n_perm: int
    sets: Mapping[str, np.ndarray]
    seed: int
    threads: int = 1

    def prepare(self) -> Work:
        made: dict[str, ComponentTest] = {}

        def work(asked: Asked) -> list[Any]:
            name = asked.component
            if name not in made:
                made[name] = ComponentTest(self, name)
            test = made[name]
            if asked.seeds is not None:
                return test.drawn(asked.seeds)
            if asked.names is None:
                return [test.alone(self.stream(name, self.fit.cells.response_name))]
            return [
                test.among_many(self._cells(response, column), self.stream(name, response))
                for response, column in zip(asked.names, asked.columns, strict=True)
            ]

        return work

    def stream(self, component: str, response: str) -> np.random.Generator:
        """Random numbers of a test."""
        return named_generator(self.seed, f"{component} {response}")

    def _cells(self, name: str, column: Column) -> Cells | Failure:
        """The cells of the fit with one of its fates."""
        if isinstance(column, DataError):
            return Failure(name, str(column))
        y, levels = (column.y, column.levels) if isinstance(column, Coded) else (column, None)
        return replace(self.fit.cells, response=y, response_name=name, levels=levels)


def half_chi_square(gain: float) -> float:
    """Tail of an even mixture of chi-squares of zero and one degree of freedom."""
    return float(0.5 * chi2.sf(gain, 1)) if gain > 0 else 1.0


class ComponentTest:
    """The test of one component in any fate of the fit; what does not depend on the fate is made once."""

    def __init__(self, job: TestJob, name: str) -> None:
        fit, self._method = job.fit, job.method
        glmm, cells = fit.glmm, fit.cells
        self.rest = given(glmm.components, name)
        (self._own,) = (c for c in glmm.components if c.name == name)
        self._engine, _ = choose("auto", [self._own], cells.n, device=glmm.device, dtype=glmm.dtype, rank=glmm.rank)
        self._null, self._sets = _with_only(fit, self.rest).shared(), job.sets.get(name)
        self._cells, self._n_boot, self._n_perm = cells, job.n_boot, job.n_perm
        self._found: tuple[Null, Mode] | None = None
        if job.method == "likelihood_ratio":  # the null model and the component, without the interactions that go by it
            self._whole = _with_only(fit, [c for c in glmm.components if c is self._own or c in self.rest]).shared()

    def alone(self, rng: np.random.Generator) -> dict[str, Any]:
        """Of the fate of the fit: `p`, what it was made from, and `status`; for the bootstrap, only what its draws are held against."""
        return self._tested(self._cells, rng, alone=True) | {"status": "tested"}

    def among_many(self, cells: Cells | Failure, rng: np.random.Generator) -> dict[str, Any]:
        """The same of one of many fates, or why there is none."""
        if isinstance(cells, Failure):
            return {"p": np.nan, "status": f"failed: {cells.reason}"}
        try:
            with one_of_many():
                return self._tested(cells, rng, alone=False) | {"status": "tested"}
        except (DataError, ArithmeticError, ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            return {"p": np.nan, "status": f"failed: {error}"}

    def drawn(self, seeds: Sequence[int]) -> list[float]:
        """P-values in fates of the null model of the fate of the fit."""
        null, mode = self._null_fit(self._cells, keep=True)
        return null_p_values(null, mode, self._null.rule, self._engine, self._own, seeds)

    def _null_fit(self, cells: Cells, *, keep: bool) -> tuple[Null, Mode]:
        if keep and self._found is not None:
            return self._found
        model, engine, mode = _mode(self._null, cells)
        found = Null(model, engine, self._null.rule, mode), mode
        if keep:
            self._found = found
        return found

    def _tested(self, cells: Cells, rng: np.random.Generator, *, alone: bool) -> dict[str, Any]:
        if self._method == "likelihood_ratio":
            gain = 2 * (_mode(self._whole, cells)[2].free_energy - _mode(self._null, cells)[2].free_energy)
            return {"p": half_chi_square(gain), "statistic": gain}
        null, mode = self._null_fit(cells, keep=alone)
        if self._sets is not None:
            return {"p": swap_test(null, self._engine, self._own, self._sets, count=self._n_perm, rng=rng)}
        p = score_test(null, self._engine, self._own).p
        if self._method != "bootstrap":
            return {"p": p}
        if alone:
            return {"p": np.nan, "p_score": p}
        seeds = draw_seeds(rng, self._n_boot)
        drawn = null_p_values(null, mode, self._null.rule, self._engine, self._own, seeds)
        return {"p": bootstrapped(p, drawn), "p_score": p}


def given(components: Sequence[Component], name: str) -> list[Component]:
    """The components of the null model: all others, but for interactions that go by the one that is tested."""
    return [c for c in components if c.name != name and not _goes_by(c, name)]


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
