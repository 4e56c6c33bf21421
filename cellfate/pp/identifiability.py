"""Before any fit: can cells of this tree at these places tell ancestry and neighborhood apart?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from cellfate import _keys
from cellfate._runtime import logger, progress, resolve_device
from cellfate.engines.choose import choose
from cellfate.errors import DataError, unknown
from cellfate.inference.identifiability import PAIR, expected
from cellfate.io.anndata import read_cells
from cellfate.io.columns import check_adata
from cellfate.io.store import check_no_other, own
from cellfate.kernels.base import Component
from cellfate.kernels.lineage import LINEAGE_KERNELS
from cellfate.kernels.spatial import SPATIAL_KERNELS
from cellfate.model.catalog import get_family
from cellfate.model.families import Outcome
from cellfate.model.glmm import Data, Model

if TYPE_CHECKING:
    from anndata import AnnData

FAMILIES = {
    "gaussian": 0.0,
    "bernoulli": 0.5,
    "binomial": 0.5,
    "poisson": 1.0,
}  # and the mean of a response, where nothing else is said
BETWEEN = (0.2, 0.4, 0.6, 0.8)  # the shortest and the longest length-scale, in logs
AROUND = 1.5  # a length-scale, that columns are made for


def identifiability(
    adata: AnnData,
    *,
    lineage: Any = _keys.TREE,
    lineage_kernel: str = "brownian",
    spatial: Any = _keys.SPATIAL,
    spatial_kernel: str = "matern32",
    library_key: str | None = None,
    family: str = "bernoulli",
    mean: float | None = None,
    trials: int | None = None,
    variances: Mapping[str, float] | None = None,
    lengthscales: Sequence[float] | None = None,
    rank: int | None = None,
    device: str | torch.device = "auto",
    key_added: str = _keys.IDENTIFIABILITY,
    copy: bool = False,
) -> AnnData | None:
    """Say what a fate in these cells could tell of ancestry and neighborhood, before any fate is looked at.

    Where relatives stay together, the two make the same cells alike, and no method can tell them apart. How far that goes is in
    the tree and the positions alone: the information matrix of the two variances, the length-scale estimated beside them and an
    intercept integrated out (average information; Gilmour, Thompson & Cullis 1995). Exact for up to 1,500 cells, by random probes
    beyond. Standard errors are those of large samples: where they come near the variances themselves, read them as "not known".

    Parameters
    ----------
    lineage, lineage_kernel, spatial, spatial_kernel, library_key, rank, device
        As in :func:`cellfate.tl.decompose`; a kernel of positions and a tree without shapes of its own.
    family
        ``"bernoulli"``, ``"binomial"``, ``"poisson"`` or ``"gaussian"``: how much a cell says.
    mean
        Mean of the fate: 0.5 of the cells or trials, or one count, where nothing is said.
    trials
        Of each cell, for ``"binomial"``.
    variances
        Of `lineage` and `spatial` on link scale, and `residual` for gaussian; 1 each where nothing is said.
    lengthscales
        Length-scales to look at, in the units of the coordinates. By default four between the distance of neighbors and the extent.
    key_added
        Where in `adata.uns` the table goes. An earlier one of that name is replaced, anything else is refused.
    copy
        Return a copy and leave `adata` as it is.

    Returns
    -------
    `None`, or the copy. Writes `adata.uns[key_added]`, a row per length-scale, see :func:`cellfate.pl.identifiability`:

    `alignment`
        Of both kernels, centered: 0 where they make different cells alike, 1 where the same.
    `variance_lineage`, `variance_spatial`
        What was assumed.
    `error_lineage`, `error_spatial`, `correlation`
        Expected standard errors of the variances, and the correlation of the errors.
    `share`, `error_share`
        The share of ancestry in what both explain, and its expected standard error.
    `power_lineage`, `power_spatial`
        Probability that a test at 5% sees each, given the other.
    `verdict`
        In words.

    Examples
    --------
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(100, inheritance=0.9, rng=0)
    >>> cf.pp.identifiability(adata, lengthscales=[0.5])
    >>> adata.uns["cellfate_identifiability"]["alignment"].between(0, 1).all()
    np.True_
    """
    check_adata(adata)
    check_no_other(adata, key_added, "verdict", "of identifiability")
    if lineage is None or spatial is None:
        raise DataError("identifiability is about ancestry and neighborhood: give both a tree and coordinates.")
    if family not in FAMILIES:
        raise unknown("family", family, tuple(FAMILIES))
    if (family == "binomial") != (trials is not None) or not (
        trials is None or (isinstance(trials, int | np.integer) and not isinstance(trials, bool) and trials > 0)
    ):
        raise DataError(
            f"trials is {trials!r} with family={family!r}: 'binomial' needs how many trials a cell has, such as 10, and no other family "
            "has any."
        )
    for argument, name, kernels in (
        ("lineage_kernel", lineage_kernel, LINEAGE_KERNELS),
        ("spatial_kernel", spatial_kernel, SPATIAL_KERNELS),
    ):
        if name not in kernels:
            raise unknown(argument, name, tuple(kernels))
    cells = read_cells(
        adata,
        None,
        family="bernoulli" if family == "binomial" else family,  # of which nothing is read
        lineage=lineage,
        lineage_kernel=lineage_kernel,
        spatial=spatial,
        library_key=library_key,
    )
    if cells.forest is None or cells.leaf is None or cells.coordinates is None:
        raise DataError("identifiability needs a tree and coordinates of the same cells.")
    ancestry = LINEAGE_KERNELS[lineage_kernel](cells.forest, cells.leaf)
    field = SPATIAL_KERNELS[spatial_kernel](cells.coordinates, cells.specimen)
    if any(h.fixed is None for h in ancestry.hyperparameters):
        raise DataError(
            f"lineage_kernel {lineage_kernel!r} has a shape of its own, for which no value is known before a fit: take 'brownian' or "
            "'clone'."
        )
    components = [Component(PAIR[0], ancestry), Component(PAIR[1], field)]
    assumed = _variances(variances, family)
    nearest, extent = field.bounds
    scales = (
        [nearest * (extent / nearest) ** share for share in BETWEEN] if lengthscales is None else list(lengthscales)
    )
    if not scales or not all(isinstance(x, int | float | np.number) and np.isfinite(x) and x > 0 for x in scales):
        raise DataError(f"lengthscales is {lengthscales!r}, wanted positive numbers in the units of the coordinates.")
    on, zero = resolve_device(device), torch.zeros(cells.n, dtype=torch.float64)
    y = torch.as_tensor(np.resize([0.0, 1.0], cells.n)).to(on)  # of which nothing is taken
    total = None if trials is None else torch.full_like(y, trials)
    data = Data(Outcome(y, total), torch.ones_like(y)[:, None], ("Intercept",), zero.to(on))
    model = Model(get_family(family, None), components, data, {"beta": ("normal", 10.0)})
    precision = _precision(family, mean, assumed, trials)
    logger.info("assumed: %s", _assumed(family, mean, trials, assumed))
    engine, _ = choose("auto", components, cells.n, device=on, dtype=torch.float64, rank=rank)
    rows = []
    for scale in progress(scales, desc="length-scales", unit="length-scale"):
        focused = engine.focus({PAIR[1]: (scale / AROUND, scale * AROUND)})
        values = {f"variance_{name}": assumed[name] for name in PAIR} | {f"lengthscale_{PAIR[1]}": float(scale)}
        found = expected(model, focused, values, precision)
        row = {"lengthscale": float(scale), "alignment": found.alignment}
        row |= {f"variance_{name}": assumed[name] for name in PAIR}
        row |= {f"error_{name}": error for name, error in found.errors.items()}
        row |= {"correlation": found.correlation, "share": found.share, "error_share": found.error_share}
        row |= {f"power_{name}": power for name, power in found.power.items()}
        rows.append(row | {"verdict": found.verdict})
    adata = adata.copy() if copy else adata
    own(adata)
    adata.uns[key_added] = pd.DataFrame(rows)
    return adata if copy else None


def _variances(given: Mapping[str, float] | None, family: str) -> dict[str, float]:
    known = [*PAIR, "residual"] if family == "gaussian" else list(PAIR)
    assumed = dict.fromkeys(known, 1.0) | dict(given or {})
    wrong = [name for name in assumed if name not in known or not np.isfinite(assumed[name]) or assumed[name] <= 0]
    if wrong:
        raise DataError(f"variances has {wrong}, wanted positive numbers for {known}.")
    return assumed


def _assumed(family: str, mean: float | None, trials: int | None, assumed: Mapping[str, float]) -> str:
    """What was taken for granted, in words."""
    at = FAMILIES[family] if mean is None else mean
    said = {
        "bernoulli": f"one yes or no per cell, {at:g} of them yes",
        "binomial": f"{trials} tries per cell, {at:g} of them a success",
        "poisson": f"a count per cell, {at:g} in the mean",
        "gaussian": "a measurement per cell",
    }[family]
    variances = ", ".join(f"{name} {value:g}" for name, value in assumed.items())
    return f"{said}; variances {variances} (other fates by family, trials, mean, variances)"


def _precision(family: str, mean: float | None, assumed: Mapping[str, float], trials: int | None = None) -> float:
    """What one cell says of its latent value: the expected curvature of the log-density, over cells that differ."""
    if family == "gaussian":
        return 1 / assumed["residual"]
    mean = FAMILIES[family] if mean is None else mean
    binary = family in ("bernoulli", "binomial")
    highest = 1.0 if binary else np.inf
    if not 0 < mean < highest:
        raise DataError(f"mean is {mean!r}, wanted the mean of a {family} fate, between 0 and {highest:g}.")
    fate, total = get_family(family, None), assumed[PAIR[0]] + assumed[PAIR[1]]
    eta = np.log(mean / (1 - mean)) if binary else np.log(mean) - total / 2
    at = torch.tensor([eta], dtype=torch.float64)
    tries = None if trials is None else torch.full_like(at, trials)
    return float(fate.expect(Outcome(torch.zeros(1).to(at), tries), at, torch.full_like(at, total)).precision)
