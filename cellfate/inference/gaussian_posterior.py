"""Modes and draws of the hyperposteriors of many gaussian responses, from their tabulated forms.

Every function works on some of the responses at once, and finds for each what it would find for it alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import logsumexp

from cellfate.inference.gaussian_forms import Forms, log_likelihood, quadratic, take
from cellfate.inference.gaussian_proposals import Proposals, factor_of
from cellfate.inference.gaussian_tables import Tables, cardinal
from cellfate.inference.hyperposterior import INFLATE
from cellfate.model.glmm import Model
from cellfate.model.priors import HalfNormal, LogNormal, Parameter

SCOUTS, CLOUD = 256, 4096  # points of the first and of the last proposal
FAR = 8.0  # posterior sds up to which these tables reach
AROUND = (3.0, 1.5, 3.0)  # the same about where a mode is sought
STEPS = 40  # of Newton's method
SHARES = np.array([1.0, 0.5, 0.2, 0.05, 0.01])  # of a step that are tried
CONVERGED = 1e-8  # nats that another step would bring
MOST_LEFT = 0.8  # of what cells have for themselves, that columns may leave out
PROBE = 0.1  # posterior sds, or units where they are not known, between points of a finite difference
FINEST = 2e-4  # of a unit, between them at least: closer by, differences are rounding
SMALLEST = 0.05  # of an sd's unit, from which the search for a mode begins at least


@dataclass(frozen=True)
class Modes:
    """Where the log posterior of each response is highest: coordinates (g, d), curvature (g, d, d)."""

    u: np.ndarray
    log_posterior: np.ndarray
    log_prior: np.ndarray
    curvature: np.ndarray
    gain: np.ndarray  # that another step would bring
    steps: np.ndarray  # (g,) that each took, whatever its company


@dataclass(frozen=True)
class Cloud:
    """Weighted points of each hyperposterior: u (g, t, d), log ratio of posterior to proposal (g, t)."""

    u: np.ndarray
    log_ratio: np.ndarray
    own_variance: np.ndarray  # (g, t), over the squared scale of the response
    forms: np.ndarray  # (g, t, q)
    edge: np.ndarray  # (g,), share of the weight next to a bound of the tables that is none of the model


class Posteriors:
    """The log posteriors of responses that share a table.

    models: one a response, of which the priors are taken; scale: (k,), the tables are of responses over it; level: (k, p), what
    was taken off each response beforehand, in columns of the design and over `scale`.
    """

    def __init__(
        self, models: Sequence[Model], tables: Tables, scale: np.ndarray, level: np.ndarray, names: tuple[str, str, str]
    ) -> None:
        self.models, self.tables, self.scale, self.level = models, tables, scale, level
        self._lineage, self._columns, self._lengthscale = names
        self.parameters = [model.parameters for model in models]
        self.scales = [p.scale for p in self.parameters[0]]
        self.folded = np.array([s == "sd" for s in self.scales])
        self.n = models[0].data.n
        beta_sd = np.array([m.beta_sd.cpu().numpy() for m in models]).reshape(len(models), -1)
        self.beta_precision = (scale[:, None] / beta_sd) ** 2
        grid = tables.shared.grid
        self._nodes = (grid.lineage.x[None], grid.lengthscale.x[None], grid.columns.x[None])
        self._left = tables.shared.left_out if len(tables.shared.left_out) == grid.shape[1] else None
        self._left_fixed = float(tables.shared.left_out[0])

    def forms(self, rows: np.ndarray) -> Forms:
        return Forms((self.tables.forms[rows], self.tables.shared.forms[None]), self._nodes)

    def unit(self, rows: np.ndarray) -> np.ndarray:
        """The natural step of each coordinate (g, d)."""
        return np.array([[p.start if p.scale == "sd" else 1.0 for p in self.parameters[i]] for i in rows])

    def bounds(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        both = np.array([[p.bounds for p in self.parameters[i]] for i in rows]).reshape(len(rows), -1, 2)
        return both[..., 0], both[..., 1]

    # -- densities -----------------------------------------------------------------------------------------------------

    def log_prior(self, rows: np.ndarray, u: np.ndarray) -> np.ndarray:  # (g, t, d) -> (g, t)
        total = np.zeros(u.shape[:2])
        for k in range(u.shape[-1]):
            total += _log_density([self.parameters[i][k] for i in rows], u[..., k])
        return total

    def ratios(self, rows: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates (g, t, 3) in the tables, the own variance (g, t) over the squared scale, and which are outside."""
        g, t, d = u.shape
        values = {
            name: value.numpy().reshape(g, t)
            for name, value in self.models[0].theta(torch.as_tensor(u.reshape(g * t, d))).values.items()
        }
        grid, unit = self.tables.shared.grid, self.scale[rows][:, None]

        def variance(name: str) -> np.ndarray:
            return (values[f"sd_{name}"] / unit) ** 2 if name else np.zeros((g, t))

        at, outside = np.zeros((g, t, 3)), np.zeros((g, t), dtype=bool)
        left = np.full((g, t), self._left_fixed)
        if self._lengthscale:
            at[..., 1] = np.log(values[self._lengthscale])
            low, high = grid.lengthscale.x[[0, -1]]
            outside |= (at[..., 1] < low - 1e-9) | (at[..., 1] > high + 1e-9)
            at[..., 1] = np.clip(at[..., 1], low, high)
            left = self._left_at(at)
        spatial = variance(self._columns)
        v = (values["sd_residual"] / unit) ** 2 + spatial * np.maximum(left, 0.0)
        for i, (part, axis) in enumerate(((variance(self._lineage), grid.lineage), (spatial, grid.columns))):
            place = axis.coordinate(part / v)
            if len(axis.x) > 1:
                outside |= place > axis.x[-1] + 1e-9
                at[..., 2 * i] = np.clip(place, axis.x[0], axis.x[-1])
        return at, v, outside

    def _left_at(self, at: np.ndarray) -> np.ndarray:  # (..., 3) -> (...)
        """Mean over cells of what the columns leave out, of a unit variance."""
        if self._left is None:
            return np.full(at.shape[:-1], self._left_fixed)
        return (cardinal(self._nodes[1][0], at[..., 1].ravel()) @ self._left).reshape(at.shape[:-1])

    def log_posterior(self, rows: np.ndarray, u: np.ndarray, forms: Forms) -> np.ndarray:  # (g, t, d) -> (g, t)
        return self.look(rows, u, forms)[0]

    def look(self, rows: np.ndarray, u: np.ndarray, forms: Forms) -> tuple[np.ndarray, ...]:
        """Log posterior (g, t), where in the tables (g, t, 3), own variance (g, t) and forms (g, t, q) of points u (g, t, d)."""
        at, v, outside = self.ratios(rows, u)
        found = forms(at)
        value = self.log_likelihood(rows, v, found) + self.log_prior(rows, u)
        return np.where(outside, -np.inf, value), at, v, found

    def log_likelihood(self, rows: np.ndarray, v: np.ndarray, found: np.ndarray) -> np.ndarray:
        value = log_likelihood(found, v, self.beta_precision[rows], self.level[rows], float(self.n))
        return value - self.n * np.log(self.scale[rows])[:, None]

    def beta(self, row: int, v: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean (t, p) and lower factor (t, p, p) of the covariance of the fixed effects, where forms are `found` (t, q)."""
        p = self.level.shape[1]
        if not p:
            return np.zeros((len(v), 0)), np.zeros((len(v), 0, 0))
        i, j = np.tril_indices(p)
        inner = np.zeros((len(v), p, p))
        inner[:, i, j] = np.where(i == j, np.exp(found[:, 2 + p :]), found[:, 2 + p :])
        precision = inner @ inner.mT
        prior = v[:, None] * self.beta_precision[row]
        precision[:, range(p), range(p)] += prior
        explained = (inner @ found[:, 1 : 1 + p, None])[..., 0]
        shift = np.linalg.solve(precision, (explained - prior * self.level[row])[..., None])[..., 0]
        factor = np.linalg.cholesky(np.linalg.inv(precision) * v[:, None, None])
        return self.scale[row] * (shift + self.level[row]), self.scale[row] * factor

    # -- modes ---------------------------------------------------------------------------------------------------------

    def start(self, rows: np.ndarray) -> np.ndarray:
        """The best node of the tables, with the own variance at its best there: coordinates (g, d)."""
        return self.scan(rows)[0]

    def scan(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """That, and the log posterior with the own variance at its best (g, *nodes)."""
        grid = self.tables.shared.grid
        a, b, c = np.meshgrid(grid.lineage.natural, grid.lengthscale.x, grid.columns.natural, indexing="ij")
        left = np.full(len(grid.lengthscale.x), self._left_fixed) if self._left is None else self._left
        rest = 1 - c * np.broadcast_to(left[:, None], c.shape[1:])
        shared = np.broadcast_to(self.tables.shared.forms, (len(rows), *self.tables.shared.forms.shape))
        found = np.concatenate([self.tables.forms[rows], shared], -1).reshape(len(rows), a.size, -1)
        ones = np.ones(found.shape[:2])
        v = quadratic(found, ones, self.beta_precision[rows], self.level[rows]) / self.n
        unit = self.scale[rows][:, None]
        natural = {"sd_residual": np.sqrt(v * np.maximum(rest.ravel(), 1e-6)) * unit}
        natural |= {f"sd_{self._lineage}": np.sqrt(v * a.ravel()) * unit}
        natural |= {f"sd_{self._columns}": np.sqrt(v * c.ravel()) * unit}
        natural |= {self._lengthscale: np.broadcast_to(np.exp(b.ravel()), v.shape)}
        columns = [
            natural[p.name] if p.scale == "sd" else np.log(natural[p.name]) for p in self.parameters[int(rows[0])]
        ]
        u = np.stack(columns, -1)
        value = self.log_likelihood(rows, v, found) + self.log_prior(rows, u)
        value = np.where((rest.ravel() > 1e-6) & np.isfinite(value), value, -np.inf)
        best = value.argmax(1)
        return u[np.arange(len(rows)), best], value.reshape(len(rows), *a.shape)

    def modes(self, rows: np.ndarray) -> Modes:
        """By Newton's method, from the best node."""
        forms, unit = self.forms(rows), self.unit(rows)
        low, high = self.bounds(rows)
        u = self.start(rows)
        u = np.clip(np.where(self.folded, np.maximum(u, SMALLEST * unit), u), low, high)
        at = self.ratios(rows, u[:, None])[0][:, 0]
        forms = forms.about(at, np.array(AROUND))
        probe, active = 0.2 * PROBE * unit, np.ones(len(rows), dtype=bool)
        value, gain = np.full(len(rows), -np.inf), np.full(len(rows), np.inf)
        curvature = np.zeros((*u.shape, u.shape[1]))
        steps = np.zeros(len(rows), dtype=np.int64)
        for _ in range(STEPS):
            on = np.flatnonzero(active)
            steps[on] += 1
            some = take(forms, on)
            here, slope, bend = self._derivatives(rows[on], u[on], probe[on], some)
            scaled, pull = bend * unit[on][:, :, None] * unit[on][:, None, :], slope * unit[on]
            stuck = ((u[on] <= low[on]) & (pull < 0)) | ((u[on] >= high[on]) & (pull > 0))
            scaled = np.where(stuck[:, :, None] | stuck[:, None, :], 0.0, scaled)
            pull = np.where(stuck, 0.0, pull)
            values, vectors = np.linalg.eigh(scaled)
            size = np.maximum(np.abs(values), 1e-2)
            move = ((vectors / size[:, None, :]) @ (vectors.mT @ pull[..., None]))[..., 0]
            move *= np.minimum(1.0, 1.0 / np.maximum(np.abs(move).max(-1), 1e-300))[:, None]
            curvature[on], value[on], gain[on] = bend, here, 0.5 * (pull * move).sum(-1)
            tried = np.clip(
                u[on][:, None] + SHARES[:, None] * (move * unit[on])[:, None], low[on][:, None], high[on][:, None]
            )
            there = np.nan_to_num(self.log_posterior(rows[on], tried, some), nan=-np.inf, neginf=-np.inf)
            best = there.argmax(1)
            better = there[np.arange(len(on)), best] > here
            u[on[better]] = tried[better, best[better]]
            sd = 1 / np.sqrt(np.maximum(np.diagonal(bend, axis1=1, axis2=2), 1 / (2 * unit[on]) ** 2))
            step = np.maximum(PROBE * sd, FINEST * unit[on])
            settled = np.abs(probe[on] / step - 1).max(-1) < 0.5
            probe[on] = step
            active[on] = ~(settled & ((gain[on] < CONVERGED) | ~better))
            if not active.any():
                break
        u = np.where(self.folded, np.abs(u), u)
        value, slope, curvature = self._derivatives(rows, u, probe, forms)
        prior = self.log_prior(rows, u[:, None])[:, 0]
        return Modes(u, value, prior, curvature, gain, steps)

    def _derivatives(
        self, rows: np.ndarray, u: np.ndarray, h: np.ndarray, forms: Forms
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log posterior (g,), its slope (g, d) and minus its second derivative (g, d, d), by central differences."""
        d = u.shape[1]
        pairs = [(i, j) for i in range(d) for j in range(i)]
        eye = np.eye(d)
        offsets = np.concatenate(
            [np.zeros((1, d)), eye, -eye, *([[eye[i] + eye[j], -eye[i] - eye[j]] for i, j in pairs])]
        )
        low, high = self.bounds(rows)
        centre = np.clip(u, low + h, high - h)  # beyond the bounds there is nothing
        points = np.concatenate([u[:, None], centre[:, None] + offsets * h[:, None]], 1)
        values = self.log_posterior(rows, points, forms)
        there, f = values[:, 0], values[:, 1:]
        f = np.nan_to_num(f, nan=-np.inf, posinf=-np.inf, neginf=-np.inf)
        lost = ~np.isfinite(f[:, 0])  # a response that tables do not hold: it is found out by its value
        f = np.where(lost[:, None], 0.0, np.maximum(f, f[:, :1] - 1e6))
        up, down, both = f[:, 1 : 1 + d], f[:, 1 + d : 1 + 2 * d], f[:, 1 + 2 * d :]
        bend = np.zeros((len(u), d, d))
        bend[:, range(d), range(d)] = -(up + down - 2 * f[:, :1]) / h**2
        for k, (i, j) in enumerate(pairs):
            mixed = both[:, 2 * k] + both[:, 2 * k + 1] - up[:, i] - up[:, j] - down[:, i] - down[:, j] + 2 * f[:, 0]
            bend[:, i, j] = bend[:, j, i] = -mixed / (2 * h[:, i] * h[:, j])
        return np.where(lost, -np.inf, there), (up - down) / (2 * h), bend

    # -- draws ---------------------------------------------------------------------------------------------------------

    def cloud(self, rows: np.ndarray, modes: Modes, turns: Sequence[np.random.Generator]) -> Cloud:
        """Points of a proposal that was fitted to those of a first one, weighted by the posterior."""
        forms, (low, high) = self.forms(rows), self.bounds(rows)
        location, factor = modes.u, factor_of(modes.curvature, self.unit(rows))
        for count in (SCOUTS, CLOUD):
            proposal = Proposals(location, INFLATE * factor, self.folded)
            u = proposal.draw(count, turns)
            inside = np.asarray(((u >= low[:, None]) & (u <= high[:, None])).all(-1))
            value, at, v, found = self.look(rows, np.where(inside[..., None], u, location[:, None]), forms)
            log_ratio = np.where(
                inside, np.nan_to_num(value, nan=-np.inf, neginf=-np.inf) - proposal.log_density(u), -np.inf
            )
            whole = logsumexp(log_ratio, axis=1, keepdims=True)
            weight = np.exp(log_ratio - np.where(np.isfinite(whole), whole, 0.0))
            if count == CLOUD:
                edge = np.where(np.isfinite(whole[:, 0]), self._edge(rows, at, weight), np.inf)
                return Cloud(u, log_ratio, v, found, edge)
            capped = np.minimum(weight, 8 / SCOUTS)  # a single point is no shape
            capped /= np.maximum(capped.sum(1, keepdims=True), np.finfo(float).tiny)
            centre = (capped[..., None] * u).sum(1)
            apart = u - centre[:, None]
            spread = np.einsum("gt,gti,gtj->gij", capped, apart, apart)
            location, factor = centre, np.linalg.cholesky(spread + 0.05 * factor @ factor.mT)
            middle = (capped[..., None] * at).sum(1)
            reach = FAR * np.sqrt((capped[..., None] * (at - middle[:, None]) ** 2).sum(1)) + 1e-3
            forms = forms.about(middle, reach)
        raise AssertionError("the last proposal is not the last")

    def _edge(self, rows: np.ndarray, at: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Share of the weight where tables do not hold: in the last fiftieth of their axes, where the model itself goes on."""
        grid = self.tables.shared.grid
        # a residual that is small beside what columns leave out: there, forms vary too much between points
        near = (np.exp(at[..., 2]) - grid.columns.base) * self._left_at(at) > MOST_LEFT
        for i, axis in ((0, grid.lineage), (2, grid.columns)):
            if len(axis.x) > 1:
                near |= at[..., i] > axis.x[-1] - np.ptp(axis.x) / 50
        if self._lengthscale and len(grid.lengthscale.x) > 1:
            (own,) = (p for p in self.parameters[int(rows[0])] if p.name == self._lengthscale)
            x, reach = grid.lengthscale.x, np.ptp(grid.lengthscale.x) / 50
            if math.log(own.lower) < x[0] - 1e-6:
                near |= at[..., 1] < x[0] + reach
            if math.log(own.upper) > x[-1] + 1e-6:
                near |= at[..., 1] > x[-1] - reach
        return np.where(near, weight, 0.0).sum(1)


def _log_density(parameters: list[Parameter], u: np.ndarray) -> np.ndarray:  # (g, t)
    """Log prior of one coordinate of each response."""
    first, x = parameters[0], torch.as_tensor(u)
    if all(p.prior == first.prior for p in parameters):
        return first.log_density(x).numpy()
    if first.scale in ("sd", "log") and all(isinstance(p.prior, HalfNormal) for p in parameters):
        scale = np.array([p.prior.scale for p in parameters if isinstance(p.prior, HalfNormal)])[:, None]
        natural = first.natural(x).numpy()
        value = 0.5 * math.log(2 / math.pi) - np.log(scale) - 0.5 * (natural / scale) ** 2
        return value + u if first.scale == "log" else value
    if first.scale == "log" and all(isinstance(p.prior, LogNormal) for p in parameters):
        priors = [p.prior for p in parameters if isinstance(p.prior, LogNormal)]
        median, sd = np.array([[p.median, p.sd] for p in priors]).T[..., None]
        return -0.5 * ((u - np.log(median)) / sd) ** 2 - np.log(sd) - 0.5 * math.log(2 * math.pi)
    return np.stack([p.log_density(row).numpy() for p, row in zip(parameters, x, strict=True)])
