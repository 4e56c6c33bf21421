"""What sites of single contrasts cost a fate out of several, against a full block of sites for each cell.

    python benchmarks/site_blocks.py
    python benchmarks/site_blocks.py --fates 5 --n 150 --seed 1 --variance 4

The posterior of the package is a product over the contrasts of a cell given the others; its free energy puts back what that leaves
out (:mod:`cellfate.model.categorical`). Here both free energies are evaluated over a grid of the two standard deviations, the
other one from dense matrices of all contrasts at once, (K - 1) n by (K - 1) n, with a block of (K - 1) x (K - 1) sites per cell.
Printed: posterior means and sds of the standard deviations by either, under half-normal(2) priors, and the largest difference of the free
energies, less its mean, where the posterior has its mass. Without arguments the data are those of the frozen NUTS run of three
fates, whose values stand beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from machine import set_threads, table, write
from torch import Tensor

REFERENCE = Path(__file__).parent.parent / "tests" / "reference" / "fates.json"
BETA_SD, SD_SCALE, WIDEST = 5.0, 2.0, 4.5


class FullBlocks:
    """The corrected variational bound with a block of sites for each cell; arrays over cells are (n, J), contrasts last."""

    def __init__(self, y: np.ndarray, levels: int) -> None:
        from cellfate.model.categorical import _rule, contrasts

        self.h = torch.as_tensor(contrasts(levels))
        self.y = self.h[torch.as_tensor(y)]
        z, w = _rule(levels - 1, {1: 60, 2: 24, 3: 12}.get(levels - 1, 0))
        self.z, self.w = torch.as_tensor(z), torch.as_tensor(w)

    def moments(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """E f (n,), its gradient (n, J), minus its Hessian (n, J, J), and the correction (n,), under q of each cell."""
        lower = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(covariance.shape[-1]))
        away = torch.einsum("qj,nij->nqi", self.z, lower)
        at = mean[:, None] + away
        lse = torch.logsumexp(at @ self.h.T, -1)
        p = torch.softmax(at @ self.h.T, -1)
        f = (at * self.y[:, None]).sum(-1) - lse
        value, expected = f @ self.w, p @ self.h
        slope = self.y - torch.einsum("nqj,q->nj", expected, self.w)
        curved = torch.einsum("nqk,q,ki,kj->nij", p, self.w, self.h, self.h)
        curved = curved - torch.einsum("nqi,q,nqj->nij", expected, self.w, expected)
        bend = torch.einsum("nqi,nij,nqj->nq", away, curved, away) - torch.einsum("nij,nji->n", curved, covariance)[:, None]
        rest = f - value[:, None] - torch.einsum("nqj,nj->nq", away, slope) + bend / 2
        return value, slope, curved, torch.logsumexp(torch.log(self.w) + rest, -1)

    def free_energy(self, k: Tensor, start: tuple[Tensor, Tensor] | None = None) -> tuple[float, tuple[Tensor, Tensor]]:
        """At a prior covariance k (n, n) of every contrast, from sites (precision (n, J, J), shift (n, J)) on."""
        n, axes = self.y.shape
        prior = torch.block_diag(*[k] * axes)
        if start is None:
            zero = torch.zeros(n, axes, dtype=k.dtype)
            _, slope, curved, _ = self.moments(zero, 0.1 * torch.eye(axes).expand(n, -1, -1).to(k))
            start = curved, slope
        precision, shift = start
        last, step = -np.inf, 1.0
        kept = start
        for _ in range(200):
            mean, covariance, log_det = self._posterior(prior, precision, shift)
            value, slope, curved, rest = self.moments(mean, covariance)
            weights = shift - torch.einsum("nij,nj->ni", precision, mean)
            information = torch.einsum("nij,nji->", precision, covariance)
            bound = float(value.sum() - (log_det - information + (mean * weights).sum()) / 2)
            if bound < last - 1e-9 * abs(last):
                step /= 2
                precision, shift = (a + (b - a) / 2 for a, b in zip(kept, (precision, shift), strict=True))
                continue
            target = curved, torch.einsum("nij,nj->ni", curved, mean) + slope
            moved = [float(((a - b).abs() / (1 + a.abs())).max()) for a, b in zip(target, (precision, shift), strict=True)]
            if max(moved) < 1e-4 or (abs(bound - last) < 1e-7 and max(moved) < 1e-2):
                break
            kept, last, step = (precision, shift), bound, min(1.0, 2 * step)
            precision, shift = (a + step * (b - a) for a, b in zip(kept, target, strict=True))
        else:
            raise ArithmeticError("the updates of the full blocks did not settle")
        return bound + float(rest.sum()), (precision, shift)

    def _posterior(self, prior: Tensor, precision: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, axes = shift.shape
        lower = torch.linalg.cholesky(precision + 1e-12 * torch.eye(axes))
        root = torch.cat([torch.cat([torch.diag(lower[:, i, j]) for j in range(axes)], 1) for i in range(axes)])
        b = torch.linalg.cholesky(torch.eye(n * axes, dtype=prior.dtype) + root.T @ prior @ root)
        half = torch.linalg.solve_triangular(b, root.T @ prior, upper=False)
        whole = prior - half.T @ half
        mean = (whole @ shift.T.reshape(-1, 1)).reshape(axes, n).T
        parts = whole.reshape(axes, n, axes, n).diagonal(dim1=1, dim2=3).permute(2, 0, 1)
        return mean, parts, 2 * b.diagonal().log().sum()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fates", type=int, help="in place of the frozen problem")
    parser.add_argument("--n", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variance", type=float, default=1.5, help="of ancestry and of neighborhood")
    parser.add_argument("--points", type=int, default=14, help="of the grid, along each standard deviation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for the rows as CSV")
    options = parser.parse_args(arguments)
    set_threads(options.threads)

    import cellfate as cf
    from cellfate.engines.base import Sites
    from cellfate.kernels import Brownian, Matern32
    from cellfate.trees.convert import to_forest

    warnings.simplefilter("ignore", cf.CellfateWarning)
    known: dict = {}
    if options.fates is None:
        known = json.loads(REFERENCE.read_text())["cases"]["categorical"]
        simulate = known["simulate"]
    else:
        variances = {"variance_lineage": options.variance, "variance_spatial": options.variance}
        simulate = {"family": "categorical", "n": options.n, "n_fates": options.fates, **variances}
        simulate |= {"lengthscale": 0.5, "rng": options.seed}
    adata = cf.datasets.simulate(**simulate)
    levels, y = int(adata.uns["truth"]["n_fates"]), adata.obs["fate"].to_numpy()
    forest = to_forest(adata.uns["tree"])
    kernels = {
        "lineage": Brownian(forest, forest.nodes_of(adata.obs_names)),
        "spatial": Matern32(adata.obsm["spatial"], None, simulate["lengthscale"]),
    }
    glmm = cf.GLMM("categorical", kernels, engine="dense", priors={"beta": ("normal", BETA_SD)})

    at, weight = np.polynomial.legendre.leggauss(options.points)
    sd = WIDEST * (at + 1) / 2
    grid = np.array([(a, b) for a in sd for b in sd])
    began = time.perf_counter()
    theta = {"variance_lineage": grid[:, 0] ** 2, "variance_spatial": grid[:, 1] ** 2}
    single = np.concatenate(
        [
            np.atleast_1d(glmm.evaluate({k: v[i : i + 4] for k, v in theta.items()}, y, np.ones((len(y), 1))).free_energy)
            for i in range(0, len(grid), 4)
        ]
    )
    seconds = {"single": time.perf_counter() - began}

    began = time.perf_counter()
    model, engine, _ = glmm._problem
    n, blocks = len(y), FullBlocks(y, levels)
    whole, nothing = [], torch.zeros(1, n * (levels - 1), dtype=torch.float64)
    one = torch.eye(n, dtype=torch.float64).repeat(levels - 1, 1)[None]
    sites = None
    for a, b in grid:
        terms = model.terms(model.from_natural({"variance_lineage": a**2, "variance_spatial": b**2})[0])
        prior = engine.condition(terms, Sites(nothing, nothing)).prior_times(one)[0, :n]
        free_energy, sites = blocks.free_energy(prior, sites)
        whole.append(free_energy)
        print(f"{len(whole)} of {len(grid)}", end="\r", file=sys.stderr)
    seconds["full"] = time.perf_counter() - began

    rows = []
    base = np.outer(weight, weight).ravel() * np.exp(-0.5 * (grid**2).sum(1) / SD_SCALE**2)
    for name, value in (("single", single), ("full", np.array(whole))):
        mass = base * np.exp(value - value.max())
        mass /= mass.sum()
        row = {"sites": name, "fates": levels, "n": n, "seconds": seconds[name]}
        for i, part in enumerate(("lineage", "spatial")):
            mean = float(mass @ grid[:, i])
            row |= {f"sd_{part}": mean, f"sd_{part}_sd": float(np.sqrt(mass @ (grid[:, i] - mean) ** 2))}
        row["log_evidence"] = float(np.log(base @ np.exp(value - value.max())) + value.max())
        rows.append(row)
    gap = np.array(whole) - single
    gap = (gap - mass @ gap)[mass > 1e-3 * mass.max()]
    rows[1]["moves_by"] = float(np.abs(gap).max())
    if known:
        row = {"sites": "NUTS", "fates": levels, "n": n, "seconds": known["seconds"]}
        for part in ("lineage", "spatial"):
            row |= {f"sd_{part}": known[f"sd_{part}"]["mean"], f"sd_{part}_sd": known[f"sd_{part}"]["sd"]}
        rows.append(row)
    columns = [*rows[0], "moves_by"]
    rows = [{c: row.get(c, np.nan) for c in columns} for row in rows]
    print(table(rows, 3))
    if options.out is not None:
        print(write("site_blocks.csv", rows, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
