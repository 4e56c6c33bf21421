"""Who is next to whom: neighbor graphs, the modes in which an effect can vary over them, and what surrounds a cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array, diags_array, eye_array, issparse
from scipy.sparse.csgraph import connected_components, dijkstra
from scipy.sparse.linalg import LinearOperator, eigsh, splu
from scipy.spatial import KDTree

from cellfate.errors import DataError

EXACT = 1500  # cells of a connected component up to which its whole spectrum is computed, in a second or two
RANK = 256  # modes of a larger one
ENTRIES = 2**24  # of the matrix of modes (n, m), 128 MiB, unless a rank is asked for
SHIFT = 1e-3  # the smallest eigenvalue is zero: what is inverted is a little above
PROBES, STEPS = 8, 60  # of the Lanczos quadrature for the eigenvalues that are left out


def neighbor_graph(weights: Any, label: str = "the graph") -> csr_array:
    """Weights (n, n) between neighbors as a checked csr array without self-loops; directed if they come so."""
    try:
        graph = csr_array(weights) if issparse(weights) or np.ndim(weights) == 2 else None
    except (TypeError, ValueError):
        graph = None
    if graph is None or graph.shape[0] != graph.shape[1] or not graph.shape[0]:
        found = f"shape {graph.shape}" if graph is not None else f"type {type(weights).__name__}"
        raise DataError(
            f"{label} is of {found}, wanted a square matrix of weights (n, n), a row and a column per cell."
        )
    if graph.dtype.kind not in "biuf":
        raise DataError(f"{label} holds {graph.dtype}, wanted numbers: weights of zero or more between neighbors.")
    graph = graph.astype(np.float64)  # a copy: what follows is in place
    graph.sum_duplicates()
    for kind, bad, remedy in (
        ("NaN or infinite", ~np.isfinite(graph.data), "Compute the graph again, or leave those edges out."),
        ("negative", graph.data < 0, "A weight says how close two neighbors are: zero for strangers, never less."),
    ):
        if bad.any():
            raise DataError(f"{label} is {kind} in {int(bad.sum())} of {len(graph.data)} entries. {remedy}")
    graph.setdiag(0.0)
    graph.eliminate_zeros()
    if not graph.nnz:
        raise DataError(
            f"{label} has no edge between two of its {graph.shape[0]} cells: nobody has a neighbor. Compute it anew, such as "
            "`squidpy.gr.spatial_neighbors(adata)`."
        )
    return graph


def nearest_neighbors(coordinates: np.ndarray, specimen: np.ndarray, k: int) -> csr_array:
    """The `k` nearest neighbors of each cell within its specimen, with weights of one; fewer where there are fewer."""
    rows, columns = [], []
    for code in np.unique(specimen):
        cells = np.flatnonzero(specimen == code)
        if len(cells) < 2:
            continue
        found = KDTree(coordinates[cells]).query(coordinates[cells], k=min(k + 1, len(cells)))[1]
        own = found == np.arange(len(cells))[:, None]
        own[~own.any(1), -1] = True  # of many cells at one point, the cell itself need not be among the nearest
        columns.append(cells[found[~own]])
        rows.append(np.repeat(cells, found.shape[1] - 1))
    n = len(coordinates)
    if not rows:
        return csr_array((n, n))
    row, column = np.concatenate(rows), np.concatenate(columns)
    return csr_array((np.ones(len(row)), (row, column)), shape=(n, n))


def neighbor_average(graph: csr_array, features: Any) -> np.ndarray:
    """Weighted mean (n, q) of the neighbors' features, dense or sparse; a cell without neighbors has the average of all."""
    degree = np.asarray(graph.sum(1)).ravel()
    lonely = degree == 0
    out = graph @ features
    out = (out.toarray() if issparse(out) else np.asarray(out, dtype=np.float64)) / np.where(lonely, 1.0, degree)[
        :, None
    ]
    if lonely.any() and not lonely.all():
        out[lonely] = out[~lonely].mean(0)
    return out


@dataclass(frozen=True, eq=False)
class Modes:
    """Eigenvectors of the Laplacian of a graph, those of smallest eigenvalue, each within one connected component.

    What is left out of the spectrum is kept as points with weights: exactly where a component was decomposed whole, else by
    Gauss quadrature from Lanczos runs among what is left out (Ubaru, Chen & Saad 2017).
    """

    values: np.ndarray  # (m,), between 0 and 2
    vectors: np.ndarray  # (n, m), orthonormal
    owner: np.ndarray  # (m,), the connected component of each
    component: np.ndarray  # (n,), that of each cell
    extent: np.ndarray  # (components,), in hops, from end to end
    rest: tuple[np.ndarray, np.ndarray, np.ndarray]  # eigenvalues that are left out, their number, their component


def laplacian_modes(graph: csr_array, rank: int | None = None) -> Modes:
    """Modes of `L = 1 - D^-1/2 W D^-1/2`, with `W` the graph made symmetric and `D` the sums of its rows.

    `rank` is how many at most, though each connected component has one. By default all those of up to `EXACT` cells, and
    `RANK` for each component of more cells, as far as they fit `ENTRIES`.
    """
    graph = (graph + graph.T) / 2
    n = graph.shape[0]
    count, component = connected_components(graph, directed=False)
    if rank is None:
        rank = n if n <= EXACT else max(RANK, ENTRIES // n)
        most = EXACT if n <= EXACT else RANK
    else:
        most = rank
    degree = np.asarray(graph.sum(1)).ravel()
    root = np.sqrt(np.where(degree > 0, degree, 1.0))
    order = np.argsort(component, kind="stable")
    ends = np.cumsum(np.concatenate([[0], np.bincount(component, minlength=count)]))
    sorted_graph = csr_array(graph[order][:, order])

    found: list[tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]] = []
    extent = np.zeros(count)
    for c in range(count):
        cells = slice(int(ends[c]), int(ends[c + 1]))
        size = cells.stop - cells.start
        if size == 1:
            found.append((np.zeros(1), np.ones((1, 1)), (np.zeros(0), np.zeros(0))))
            continue
        part = csr_array(sorted_graph[cells, cells])
        scale = diags_array(1 / root[order[cells]])
        found.append(_component_modes(csr_array(scale @ part @ scale), root[order[cells]], min(most, size)))
        extent[c] = _extent(part)

    values = np.concatenate([v for v, _, _ in found])
    owner = np.repeat(np.arange(count), [len(v) for v, _, _ in found])
    first = np.diff(owner, prepend=-1) > 0
    # the smoothest of all components together; the first of a component is as smooth as can be and always stays
    chosen = np.lexsort((values, ~first))[: max(rank, count)]
    keep = np.zeros(len(values), dtype=bool)
    keep[chosen] = True
    vectors = np.zeros((n, int(keep.sum())))
    start = 0
    at = 0
    for c, (v, u, _) in enumerate(found):
        kept = keep[start : start + len(v)]
        width = int(kept.sum())
        vectors[order[ends[c] : ends[c + 1]], at : at + width] = u[:, kept]
        start, at = start + len(v), at + width
    beyond = [rest for _, _, rest in found]
    rest = (
        np.concatenate([values[~keep], *(nodes for nodes, _ in beyond)]),
        np.concatenate([np.ones(int((~keep).sum())), *(weight for _, weight in beyond)]),
        np.concatenate([owner[~keep], np.repeat(np.arange(count), [len(nodes) for nodes, _ in beyond])]),
    )
    return Modes(values[keep], vectors, owner[keep], component, extent, rest)


def _component_modes(
    adjacency: csr_array, null: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Eigenvalues and -vectors of `1 - adjacency` for a connected graph, and points and weights of those left out."""
    size = adjacency.shape[0]
    if size <= EXACT or count > size // 3:
        values, vectors = np.linalg.eigh(np.eye(size) - adjacency.toarray())
        rest = values[count:], np.ones(size - count)
        values, vectors = values[:count], vectors[:, :count]
    else:
        # Shift and invert, by a sparse factor: with 256 modes of 10,000 cells it takes 7 s in 2-D and 10 s in 3-D, where Lanczos
        # without inversion takes 26 s and LOBPCG with an incomplete factor 23 s for five digits.
        laplacian = (eye_array(size) - adjacency).tocsc()
        factor = splu(
            (laplacian + SHIFT * eye_array(size)).tocsc(),
            permc_spec="MMD_AT_PLUS_A",
            diag_pivot_thresh=0.0,
            options={"SymmetricMode": True},
        )
        inverse = LinearOperator(laplacian.shape, matvec=factor.solve, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(size)  # the same graph has the same modes
        values, vectors = eigsh(laplacian, count, sigma=-SHIFT, OPinv=inverse, v0=start)
        ascending = np.argsort(values)
        values, vectors = values[ascending], vectors[:, ascending]
        rest = _quadrature(laplacian, vectors)
    values = values.clip(0.0, 2.0)
    values[0], vectors[:, 0] = 0.0, null / np.linalg.norm(null)  # known, and no rounding in it
    return values, vectors, rest


def _quadrature(laplacian: Any, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights for traces over the complement of `vectors`; the weights sum to its dimension."""
    n, m = vectors.shape
    rng = np.random.default_rng(1)
    nodes, weights = [], []
    steps = min(STEPS, n - m)
    for _ in range(PROBES):
        basis = np.zeros((n, steps))
        diagonal, off = np.zeros(steps), np.zeros(steps)
        q = rng.choice([-1.0, 1.0], size=n)
        q -= vectors @ (vectors.T @ q)
        q /= np.linalg.norm(q)
        done = steps
        for j in range(steps):
            basis[:, j] = q
            step = laplacian @ q
            diagonal[j] = q @ step
            for _again in range(2):
                step -= vectors @ (vectors.T @ step)
                step -= basis[:, : j + 1] @ (basis[:, : j + 1].T @ step)
            off[j] = np.linalg.norm(step)
            if off[j] < 1e-10:
                done = j + 1
                break
            q = step / off[j]
        tridiagonal = np.diag(diagonal[:done]) + np.diag(off[: done - 1], 1) + np.diag(off[: done - 1], -1)
        theta, s = np.linalg.eigh(tridiagonal)
        nodes.append(theta)
        weights.append((n - m) / PROBES * s[0] ** 2)
    return np.concatenate(nodes).clip(0.0, 2.0), np.concatenate(weights)


def _extent(graph: csr_array) -> float:
    """Hops from end to end of a connected graph: from any cell to the farthest, and on to the farthest from there."""
    far = int(np.argmax(dijkstra(graph, unweighted=True, directed=False, indices=0)))
    return float(dijkstra(graph, unweighted=True, directed=False, indices=far).max())
