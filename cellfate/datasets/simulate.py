"""Cells with a known truth: a tree, positions that descendants inherit in part, and a fate made of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy.linalg import cholesky

from cellfate import _keys
from cellfate._runtime import SeedLike, generator
from cellfate.datasets.growth import DRIFT, LAYOUTS, grow, plant, walk
from cellfate.errors import DataError
from cellfate.kernels.lineage import LINEAGE_KERNELS, TreeSteps
from cellfate.kernels.spatial import SPATIAL_KERNELS
from cellfate.model.catalog import get_family
from cellfate.trees.convert import to_newick, to_newick_dict
from cellfate.trees.forest import Forest

if TYPE_CHECKING:
    from anndata import AnnData

EXACT = 1500  # cells of a specimen up to which its spatial field is drawn from the exact covariance
FEATURES = 2048  # random Fourier features above
PAIRS = 1_000_000  # random pairs of cells that then estimate the mean covariance, to about 3e-4
SMOOTHNESS = {"matern12": 0.5, "matern32": 1.5, "matern52": 2.5}  # nu; rbf is the limit


def simulate(
    n: int,
    *,
    family: str = "bernoulli",
    link: str | None = None,
    variance_lineage: float | Sequence[float] = 1.0,
    variance_spatial: float | Sequence[float] = 1.0,
    lengthscale: float = 0.5,
    inheritance: float = 0.5,
    layout: str = DRIFT,
    lineage_kernel: str = "brownian",
    alpha: float | None = None,
    pagel_lambda: float | None = None,
    burst_rate: float | None = None,
    spatial_kernel: str = "matern32",
    dimensions: int = 2,
    n_specimens: int = 1,
    intercept: float = 0.0,
    coefficients: Mapping[str, float] | None = None,
    trials: int | Sequence[int] | np.ndarray = 10,
    dispersion: float = 0.5,
    variance_residual: float = 0.5,
    precision: float = 10.0,
    cut_points: Sequence[float] = (0.0, 1.0, 2.0),
    n_fates: int = 3,
    death: float = 0.2,
    groups: Mapping[str, tuple[int, float]] | None = None,
    rng: SeedLike | None = None,
) -> AnnData:
    r"""Simulate cells whose fate is ancestry, neighborhood and chance, with all of them known.

    Each specimen has a birth-death tree of height 1, seen from its living leaves: given their number and the age, the
    branching times are independent, a coalescent point process (Lambert and Stadler 2013). Positions are
    :math:`\sqrt{h}` times what is inherited plus :math:`\sqrt{1-h}` times independent noise, both with unit variance on each axis, so
    that inheritance `h` confounds ancestry with neighborhood to a tunable degree. What is inherited is Brownian motion along the tree,
    by which clades come to lie across each other, or a territory of each clade's own. Both effects are
    draws from their kernel divided by its c(K), so that a variance is the expected variance among these cells, as
    :func:`cellfate.tl.decompose` reports it.

    A spatial field of up to 1,500 cells is drawn from the Cholesky factor of its exact covariance; above, from 2,048 random
    Fourier features of the kernel's spectral density, which has that covariance on average over the features.

    Parameters
    ----------
    n
        Cells in all, shared out evenly over specimens.
    family, link
        As in :func:`cellfate.tl.decompose`.
    variance_lineage, variance_spatial
        Variances of the two effects on link scale.
    lengthscale
        Of the spatial kernel; positions have unit variance on each axis.
    inheritance
        0 (relatives are scattered) to 1 (a position is all ancestry).
    layout
        ``"drift"``; or ``"territories"``, as in many embryos: children divide the territory of their parent by their numbers of cells.
    lineage_kernel, alpha, pagel_lambda, burst_rate
        `brownian`, `ou` (with `alpha`, default 2), `pagel` (with `pagel_lambda`, default 0.7), `early_burst`
        (with `burst_rate`, default 5; trees have height 1), or `clone`, for which the tree is cut when about sqrt(n) lineages
        are alive, each the founder of a clone and a tree of its own.
    spatial_kernel
        `matern12`, `matern32`, `matern52` or `rbf`.
    dimensions
        2 or 3.
    n_specimens
        Independent embryos, colonies or sections, of one distribution.
    intercept, coefficients
        Fixed effects: covariates by name with their slopes, each a standard normal column of `obs`.
    trials, dispersion, variance_residual, precision, cut_points
        Of the binomial, the negative binomial, the gaussian, the beta and the ordinal family. Cut points rise from 0.
    n_fates
        Of the categorical family: each fate has effects of its own, less their mean over the fates, with these variances, one for all or
        one each, of which :func:`cellfate.tl.decompose` with `per_fate=True` reports the `n_fates`-th parts.
    death
        Death rate over birth rate, 0 up to 1.
    groups
        Random intercepts: name to (number of levels, variance); cells get levels at random.
    rng
        Seed or generator. The tree and the positions of a seed do not depend on the family or the variances.

    Returns
    -------
    AnnData with `obs["fate"]`, `obs["trials"]` (binomial), covariates and groups, `obs["specimen"]` where there are several,
    `obsm["spatial"]`, `obsm["truth_effects"]` (n x lineage, spatial and groups, link scale), `uns["tree"]` (Newick, or a dict
    of it by specimen) and `uns["truth"]` (the settings, and as `realized` the sample variance of each effect).
    """
    from anndata import AnnData

    coefficients, groups = dict(coefficients or {}), dict(groups or {})
    of_lineage = _each("variance_lineage", variance_lineage, family, n_fates)
    of_spatial = _each("variance_spatial", variance_spatial, family, n_fates)
    variances = {"variance_residual": variance_residual} | {f"groups[{k!r}]": v for k, (_, v) in groups.items()}
    _need(n >= 2, "n", n, "2 cells or more")
    _need(1 <= n_specimens <= n, "n_specimens", n_specimens, f"between 1 and n = {n}")
    _need(dimensions in (2, 3), "dimensions", dimensions, "2 or 3")
    _need(0 <= inheritance <= 1, "inheritance", inheritance, "between 0 and 1")
    _need(layout in LAYOUTS, "layout", layout, f"one of {', '.join(LAYOUTS)}")
    _need(0 <= death < 1, "death", death, "at least 0 and below 1, death rate over birth rate")
    _need(0 < lengthscale < np.inf, "lengthscale", lengthscale, "positive and finite")
    _need(n_fates >= 2, "n_fates", n_fates, "2 or more")
    _need(
        family != "categorical" or not coefficients,
        "coefficients",
        coefficients,
        "none with family='categorical'",
    )
    _need(0 < precision < np.inf, "precision", precision, "positive and finite")
    rising = len(cut_points) > 0 and cut_points[0] == 0 and bool((np.diff(cut_points) > 0).all())
    _need(rising, "cut_points", list(cut_points), "numbers that rise from 0, such as (0, 1, 2)")
    _need(0 < dispersion < np.inf, "dispersion", dispersion, "positive and finite")
    for name, variance in variances.items():
        _need(0 <= variance < np.inf, name, variance, "a variance, zero or more and finite")
    hyper = _lineage_settings(lineage_kernel, alpha, pagel_lambda, burst_rate)
    _need(spatial_kernel in SPATIAL_KERNELS, "spatial_kernel", spatial_kernel, f"one of {', '.join(SPATIAL_KERNELS)}")
    _check_names(coefficients, groups)
    tries = _tries(trials, n) if family == "binomial" else None
    outcome = get_family(family, link)
    rng = generator(rng)

    specimen = np.sort(np.arange(n) % n_specimens)
    founders = max(2, round(np.sqrt(n / n_specimens))) if lineage_kernel == "clone" else 1
    grown = [grow(size, death, founders, inheritance, dimensions, rng, layout) for size in np.bincount(specimen)]
    names = np.array([f"cell{i}" for i in range(n)])
    forest, leaf = plant(grown, names, [f"specimen{i}" for i in range(n_specimens)])
    xyz = np.concatenate([one.positions for one in grown])

    marks = [f"[{fate}]" for fate in range(n_fates)] if family == "categorical" else [""]
    effects = pd.DataFrame(index=names)
    for mark, v_lineage, v_spatial in zip(marks, of_lineage, of_spatial, strict=True):
        lineage, scale_lineage = _lineage_field(forest, leaf, lineage_kernel, hyper, rng)
        spatial, scale_spatial = _spatial_field(xyz, specimen, spatial_kernel, lengthscale, rng)
        effects[f"lineage{mark}"] = np.sqrt(v_lineage / scale_lineage) * lineage
        effects[f"spatial{mark}"] = np.sqrt(v_spatial / scale_spatial) * spatial
    obs = pd.DataFrame(index=names)
    if n_specimens > 1:
        obs["specimen"] = pd.Categorical.from_codes(specimen, [f"specimen{i}" for i in range(n_specimens)])
    eta = np.full(n, float(intercept))
    for name, slope in coefficients.items():
        obs[name] = rng.standard_normal(n)
        eta += slope * obs[name].to_numpy()
    for name, (levels, variance) in groups.items():
        codes = rng.integers(levels, size=n)
        obs[name] = pd.Categorical.from_codes(codes, [f"{name}{i}" for i in range(levels)])
        for mark in marks:
            effects[f"{name}{mark}"] = np.sqrt(variance) * rng.standard_normal(levels)[codes]
    if family == "categorical":
        for name in ("lineage", "spatial", *groups):
            of_name = [f"{name}{mark}" for mark in marks]
            effects[of_name] -= effects[of_name].mean(axis=1).to_numpy()[:, None]
        eta = np.column_stack([effects[[c for c in effects if c.endswith(mark)]].sum(axis=1) for mark in marks])
    else:
        eta += effects.sum(axis=1).to_numpy()
    gaps = np.diff(np.asarray(cut_points, dtype=float))
    own = {"dispersion": dispersion, "precision": precision, "gaps": gaps}
    fate = outcome.simulate(eta, rng=rng, trials=tries, variance_residual=variance_residual, **own)
    obs["fate"] = fate if outcome.kind in ("real", "proportion") else fate.astype(np.int64)
    if tries is not None:
        obs["trials"] = tries

    adata = AnnData(obs=obs)
    adata.obsm[_keys.SPATIAL] = xyz
    adata.obsm["truth_effects"] = effects
    adata.uns[_keys.TREE] = to_newick(forest) if n_specimens == 1 else to_newick_dict(forest)
    truth: dict[str, Any] = {
        "family": family,
        "link": outcome.link,
        "variance_lineage": of_lineage[0] if np.ndim(variance_lineage) == 0 else np.array(of_lineage),
        "variance_spatial": of_spatial[0] if np.ndim(variance_spatial) == 0 else np.array(of_spatial),
        "lineage_kernel": lineage_kernel,
        **hyper,
        "spatial_kernel": spatial_kernel,
        "lengthscale": float(lengthscale),
        "inheritance": float(inheritance),
        "layout": layout,
        "death": float(death),
        "intercept": float(intercept),
        "coefficients": {name: float(slope) for name, slope in coefficients.items()},
        "variance_groups": {name: float(variance) for name, (_, variance) in groups.items()},
        "realized": {name: float(effects[name].var()) for name in effects},
    }
    if family == "gaussian":
        truth["variance_residual"] = float(variance_residual)
    if family == "negative_binomial":
        truth["dispersion"] = float(dispersion)
    if family == "beta":
        truth["precision"] = float(precision)
    if family == "categorical":
        truth["n_fates"] = int(n_fates)
    if family == "ordinal":
        truth["cut_points"] = np.array(cut_points, dtype=float)
    adata.uns["truth"] = truth
    return adata


def _each(name: str, variance: float | Sequence[float], family: str, n_fates: int) -> list[float]:
    """A variance for each fate, of which all families but one have a single one."""
    count = n_fates if family == "categorical" else 1
    single = np.ndim(variance) == 0
    found = [float(v) for v in ([variance] * count if single else variance)]  # type: ignore[union-attr, list-item, arg-type]
    wanted = f"a number, or one for each of {n_fates} fates" if family == "categorical" else "a number"
    _need(single or (family == "categorical" and len(found) == count), name, variance, wanted)
    _need(all(0 <= v < np.inf for v in found), name, variance, "a variance, zero or more and finite")
    return found


# --- fields ---------------------------------------------------------------------------------------------------------------


def _lineage_field(
    forest: Forest, leaf: np.ndarray, kernel: str, hyper: Mapping[str, float], rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """A draw of the kernel's process at the cells, and its c(K)."""
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in hyper.items()}
    steps = LINEAGE_KERNELS[kernel](forest, leaf).structure(values, torch.empty(0, dtype=torch.float64))
    assert isinstance(steps, TreeSteps)
    noise = steps.noise.numpy()
    gain = np.ones(forest.n_nodes) if steps.gain is None else steps.gain.numpy()
    field = walk(forest.parent, gain, noise, rng.standard_normal((forest.n_nodes, 1)))[leaf, 0]
    # With w the sum, over the leaves below a node, of the gains on the way there: 1'K1 = sum of noise w^2.
    total, trace = forest.is_leaf.astype(float).tolist(), forest.is_leaf.astype(float).tolist()
    for node, (above, g) in enumerate(zip(forest.parent.tolist(), gain.tolist(), strict=True)):
        if above >= 0:
            total[above] += g * total[node]
            trace[above] += g * g * trace[node]
    n = len(leaf)
    return field, _mean_variance(float(noise @ trace), float(noise @ np.square(total)), n, "lineage")


def _spatial_field(
    xyz: np.ndarray, specimen: np.ndarray, kernel: str, lengthscale: float, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """A draw of the kernel's field at the cells, independent between specimens, and its c(K)."""
    field, total = np.empty(len(xyz)), 0.0
    for code in np.unique(specimen):
        inside = np.flatnonzero(specimen == code)
        at = xyz[inside]
        if len(at) <= EXACT:
            k = correlation(kernel, np.linalg.norm(at[:, None] - at, axis=-1) / lengthscale)
            total += float(k.sum())
            k[np.diag_indices_from(k)] += 1e-9  # rbf is singular in float64; adds a billionth to the variance
            field[inside] = cholesky(k, lower=True) @ rng.standard_normal(len(at))
        else:
            field[inside] = fourier_field(at, kernel, lengthscale, rng)
            one, other = rng.integers(len(at), size=PAIRS), rng.integers(1, len(at), size=PAIRS)
            distance = np.linalg.norm(at[one] - at[(one + other) % len(at)], axis=-1)
            total += len(at) * (1 + (len(at) - 1) * float(correlation(kernel, distance / lengthscale).mean()))
    return field, _mean_variance(len(xyz), total, len(xyz), "spatial")


def correlation(kernel: str, ratio: np.ndarray) -> np.ndarray:
    """The spatial kernel at distance over length-scale."""
    origin = np.zeros((1, 2))
    return SPATIAL_KERNELS[kernel](origin).correlation(torch.from_numpy(ratio)).numpy()


def fourier_field(xyz: np.ndarray, kernel: str, lengthscale: float, rng: np.random.Generator) -> np.ndarray:
    """A draw of the field from random Fourier features (Rahimi and Recht 2007).

    Frequencies come from the spectral density: normal for rbf, a multivariate t with 2 nu degrees of freedom for Matern. A
    cosine and a sine with normal weights are one cosine with a Rayleigh amplitude and a uniform phase.
    """
    frequency = rng.standard_normal((xyz.shape[1], FEATURES)) / lengthscale
    if kernel in SMOOTHNESS:
        nu = SMOOTHNESS[kernel]
        frequency /= np.sqrt(rng.chisquare(2 * nu, FEATURES) / (2 * nu))
    phase = torch.from_numpy(rng.uniform(0, 2 * np.pi, FEATURES))
    amplitude = torch.from_numpy(rng.rayleigh(1 / np.sqrt(FEATURES), FEATURES))
    omega, at = torch.from_numpy(frequency), torch.from_numpy(xyz)
    return torch.cat([torch.addmm(phase, part, omega).cos_() @ amplitude for part in at.split(4096)]).numpy()


def _mean_variance(trace: float, total: float, n: int, component: str) -> float:
    """c(K) = tr(PKP)/(n - 1) from the trace and the sum of all entries."""
    scale = (trace - total / n) / (n - 1)
    if scale <= 1e-12 * trace / n:
        raise DataError(
            f"the {component} kernel is the same for all {n} cells, so it has no variance among them. "
            "Simulate more cells, or a shorter length-scale."
        )
    return scale


# --- what can be asked for ------------------------------------------------------------------------------------------------


def _need(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise DataError(f"{name} is {value!r}: it has to be {wanted}.")


def _lineage_settings(
    kernel: str, alpha: float | None, pagel_lambda: float | None, burst_rate: float | None
) -> dict[str, float]:
    """Hyperparameters of the lineage kernel by the names it gives them."""
    _need(kernel in LINEAGE_KERNELS, "lineage_kernel", kernel, f"one of {', '.join(LINEAGE_KERNELS)}")
    _need(alpha is None or kernel == "ou", "alpha", alpha, "left out unless lineage_kernel='ou'")
    _need(pagel_lambda is None or kernel == "pagel", "pagel_lambda", pagel_lambda, "left out unless 'pagel'")
    _need(burst_rate is None or kernel == "early_burst", "burst_rate", burst_rate, "left out unless 'early_burst'")
    alpha = 2.0 if alpha is None else alpha
    burst_rate = 5.0 if burst_rate is None else burst_rate
    pagel_lambda = 0.7 if pagel_lambda is None else pagel_lambda
    _need(0 < alpha < np.inf, "alpha", alpha, "positive and finite")
    _need(0 <= pagel_lambda <= 1, "pagel_lambda", pagel_lambda, "between 0 and 1")
    _need(0 < burst_rate < np.inf, "burst_rate", burst_rate, "positive and finite")
    settings = {"ou": {"alpha": alpha}, "pagel": {"lambda": pagel_lambda}, "early_burst": {"rate": burst_rate}}
    return {name: float(value) for name, value in settings.get(kernel, {}).items()}


def _tries(trials: int | Sequence[int] | np.ndarray, n: int) -> np.ndarray:
    tries = np.asarray(trials)
    _need(tries.shape in ((), (n,)), "the shape of trials", tries.shape, f"() or ({n},), one number or one per cell")
    _need(bool((tries >= 1).all()), "the smallest of trials", int(tries.min()), "1 or more")
    return np.broadcast_to(tries, n).astype(np.int64)


def _check_names(coefficients: Mapping[str, float], groups: Mapping[str, tuple[int, float]]) -> None:
    for name in (*coefficients, *groups):
        taken = name in ("fate", "trials", "specimen", "lineage", "spatial") or (
            name in coefficients and name in groups
        )
        _need(not taken, "the name of a covariate or group", name, "another one, this is taken")
    for name, (levels, _) in groups.items():
        _need(levels >= 2, f"groups[{name!r}]", levels, "2 levels or more")
