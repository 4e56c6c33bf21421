"""The main job: how much of the variation in a fate is ancestry, how much is neighborhood."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cellfate import __version__, _keys
from cellfate._runtime import SeedLike, logger
from cellfate.cells import Cells
from cellfate.distributed.executors import executor, here
from cellfate.errors import CellfateWarning
from cellfate.inference.fit import GLMM
from cellfate.io.again import GIVEN, named, noted_groups
from cellfate.io.anndata import read_cells
from cellfate.io.columns import check_adata
from cellfate.io.design import columns_of
from cellfate.io.groups import TAKEN
from cellfate.io.many import find_fates
from cellfate.io.neighbors import graph_of_field
from cellfate.io.store import check_free, write_many, write_results, write_table
from cellfate.io.trees import find_trees, one_of_one, under_each
from cellfate.tl.components import check_kernels, components_of, with_truncation
from cellfate.tl.jobs import Run, check_store
from cellfate.tl.many import fit_all
from cellfate.tl.posteriors import arguments_of, fit_elsewhere
from cellfate.tl.trees import check_weights, fit_trees

FEWEST_SPECIMENS = 3  # from which on the variance between specimens is a random effect

if TYPE_CHECKING:
    import torch
    from anndata import AnnData
    from distributed import Client


def decompose(
    adata: AnnData,
    fate: str | Sequence[str] | None = None,
    *,
    layer: str | None = None,
    family: str,
    link: str | None = None,
    formula: str = "~ 1",
    lineage: Any = _keys.TREE,
    lineage_kernel: str = "brownian",
    tree_weights: str | Sequence[float] = "evidence",
    spatial: Any = _keys.SPATIAL,
    spatial_kernel: str = "matern32",
    lengthscale: float | None = None,
    graph: Any = None,
    niche: Any = None,
    library_key: str | None = None,
    groups: str | list[str] | Mapping[str, str] | None = None,
    interaction: bool = False,
    olre: bool = False,
    per_fate: bool = False,
    offset: Any = None,
    trials: Any = None,
    priors: Mapping[str, object] | None = None,
    reml: bool = True,
    method: str = "variational",
    engine: str = "auto",
    rank: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float64",
    rng: SeedLike | None = None,
    min_cells: int = 10,
    chunk_size: int | str = "auto",
    key_added: str = _keys.KEY,
    client: Client | None = None,
    store: str | os.PathLike[str] | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Partition the variation of a fate into ancestry and neighborhood.

    Fits `g(E[fate]) = offset + x'beta + lineage + spatial + niche + groups` and integrates over what is not known. Needs a tree,
    see :func:`cellfate.pp.set_tree`, and coordinates in `adata.obsm["spatial"]` or a neighbor graph.

    Parameters
    ----------
    fate
        A column of `adata.obs`, or one gene of `adata.var_names`. Or a list of them, each a response with hyperparameters of its
        own; or None for all genes that are not zero in `min_cells` cells.
    layer
        Where genes are read, in place of `adata.X`. Of many genes only a chunk is dense at a time; `X` may be on disk.
    family, link
        ``"gaussian"``; ``"bernoulli"`` or ``"binomial"`` (``"logit"``, ``"probit"``, ``"cloglog"``); ``"poisson"`` or
        ``"negative_binomial"`` (``"log"``; variance mu + dispersion mu^2); ``"ordinal"``, stages in their order (``"logit"``,
        ``"probit"``; the first cut point is 0, `gap_1`, ... are estimated); ``"beta"``, probabilities (``"logit"``; variance
        mu (1 - mu) / (1 + precision)); ``"categorical"``, one of K fates (``"softmax"``), or a key of `adata.obsm` with a column
        for each of counts or probabilities: every fate has effects of its own that sum to zero over fates, with one variance per
        component, and effects are columns such as `lineage[ICM]_mean`.
    formula
        Fixed effects from `adata.obs`, such as ``"~ 1 + stage"``.
    lineage
        Key of the tree in `adata.uns` or `adata.obst`, the tree itself, or None to leave ancestry out. With
        `lineage_kernel="clone"` also a column of `adata.obs`. Or a list of keys, or of trees that share cells: as many trees of
        the same cells, such as bootstrap replicates or draws of a tree's posterior. The model is fitted under each, to the cells that
        are in all of them, and the fits are pooled. (Trees without a cell in common are one forest.)
    lineage_kernel
        ``"brownian"``: covariance is the shared path; ``"ou"``: ancestry is forgotten at a rate alpha that is estimated;
        ``"pagel"``: internal branches scaled by a lambda that is estimated; ``"early_burst"``: drift slows down at a rate that
        is estimated, for fates decided early and then kept; ``"clone"``: identity of the clone only.
    tree_weights
        Of several trees. ``"evidence"``: each counts by how probable it is given this fate, all being equally likely before (Bayesian
        model averaging, Hoeting et al. 1999): right for draws of a posterior that other data made, such as barcodes. Where there are
        many cells, that is often a single tree, and the log says so. ``"equal"``: the fate has no say in which tree is true, as with
        Rubin's rules over trees (Nakagawa & de Villemereuil 2019). Or a weight of 0 or more for each.
    spatial
        Key of coordinates (n, 2 or 3) in `adata.obsm`, the coordinates themselves, or None to leave neighborhood out. With
        `spatial_kernel="graph"` the key of a neighbor graph in `adata.obsp`, or a sparse matrix (n, n) of weights.
    spatial_kernel, lengthscale
        ``"matern12"``, ``"matern32"``, ``"matern52"`` or ``"rbf"`` on the coordinates; ``"graph"`` on the neighbor graph, see
        :class:`cellfate.kernels.Graph`. The length-scale, in units of the coordinates or in hops, is estimated unless given.
    graph
        The neighbor graph: key of `adata.obsp`, or a sparse matrix. For `niche`, and for `spatial_kernel="graph"` where `spatial`
        does not name one. By default ``"spatial_connectivities"``, which `squidpy.gr.spatial_neighbors` writes.
    niche
        Key of `adata.obsm` with features of the cells, such as columns of 0 and 1 for types: their averages over the neighbors of
        a cell are the component `niche`, see :class:`cellfate.kernels.Composition`. Of more than 100 features, the leading 100
        principal components. Where there is no graph, neighbors are the 10 nearest cells of the specimen.
    library_key
        Column of `adata.obs` that names the specimen of each cell; each specimen has a spatial field of its own.
    groups
        Columns of `adata.obs` with a random intercept per level; or a dict of them with formulas, such as
        ``{"embryo": "~ 1 + time", "clone": "~ 0 + dose"}``: each column of a formula is a random slope, component
        `embryo:time`, whose variance is that of the slopes per unit of the covariate. Intercepts and slopes are independent,
        and so a covariate beside an intercept is centered over the cells; without one it stays as it is, and levels are alike
        where it is zero. ``{"clone": "(1 + time | clone)"}``, as in lme4, is one component `clone` whose intercepts and slopes
        covary: its share holds both, its variance is that of the intercepts, and both sds and the correlation are in
        :func:`cellfate.get.hyperparameters`. By default, where `library_key` tells three or more specimens apart and is not in the formula, the
        specimen: what makes specimens differ as a whole is not neighborhood. One line of the log says so. Give ``[]`` for none.
    interaction
        Also a component `lineage:spatial`: what relatives share only where they are also neighbors. Its covariance is the product
        of the two, cell by cell, with their own length-scale and the like. With many cells it enters by few columns, see `rank`.
    olre
        An observation-level random effect, component `olre`: every cell has an effect of its own, which takes up the
        overdispersion of ``"poisson"`` counts and of ``"binomial"`` fates with several trials. The dispersion of
        ``"negative_binomial"`` does the same (a warning), and so does the residual of ``"gaussian"`` (an error); one yes or no
        per cell cannot show it (an error).
    per_fate
        For ``"categorical"`` with three fates or more: a variance for each fate, components `lineage[<fate>]`,
        `spatial[<fate>]` and so on, which add up to what the shared one would be; `lineage[<fate>]` is then the field that is that
        fate's own. A prior of `sd_lineage` is that of each. Needs exact matrices of pairs of fates times cells. Compare `log_evidence` with the shared one.
    offset
        Known part of the linear predictor on link scale, such as a log size factor: a column of `adata.obs` or (n,).
    trials
        Number of trials of a binomial fate: a column of `adata.obs`, (n,) or one number.
    priors
        By name: `sd_lineage`, `sd_spatial`, `sd_niche`, `sd_<group>`, `sd_<group>:<column>`, `sd_lineage:spatial`, `sd_olre`, `sd_residual`, `lengthscale_spatial`, `alpha_lineage`,
        `lambda_lineage`, `rate_lineage`, `dispersion`, `precision`, `gap_<k>`, `correlation_<group>`, `beta`. Each ``("half_normal", scale)``, ``("half_t", degrees, scale)``,
        ``("pc", upper, tail)`` (penalised complexity: above `upper` with probability `tail`), ``("lognormal", median, sd)``,
        ``("normal", sd)`` (`beta`), ``("uniform",)`` (`lambda_lineage`), ``("lkj", eta)``
        (`correlation_<group>`; eta = 1, uniform, by default), ``("fixed", value)`` or ``"flat"``. Default: half-normal(2) for each
        standard deviation on link scale (times the response's own for gaussian), for slopes per root mean square of the covariate.
    reml
        Integrate the fixed effects out under a wide prior; otherwise maximize over them.
    method
        ``"variational"`` (corrected, default), ``"laplace"`` or ``"ep"``.
    engine, rank
        ``"auto"``, ``"dense"`` (exact) or ``"structured"`` (linear in the cells: exact along the tree, a spatial field by `rank`
        columns, as many as it needs by default). A field on a graph has `rank` modes in every engine.
    device, dtype
        ``"auto"``, ``"cpu"`` or ``"cuda"``; ``"float64"`` or ``"float32"``.
    rng
        Seed of the integration over hyperparameters.
    min_cells, chunk_size
        For many responses: see `fate`, and how many are read at once. Results do not depend on the chunks, nor on the order.
    key_added
        Name of the slots that are written. An earlier fit of that name is replaced, anything else is refused.
    client
        A `dask.distributed.Client`: fates, or the fits under each of several trees, are computed in chunks by its workers, each on one
        thread, and with ``device="cuda"`` on the GPU that it sees. Results are those of one process to the last bit, on the same device.
    store
        A folder in which chunks of fates, or the fits under several trees, are kept as they are finished. The same call goes on from
        there, and computes what is missing; with other inputs or settings it is refused. Without `rng` the seed is that of the store.
    copy
        Return a copy and leave `adata` as it is.

    Returns
    -------
    `None`, or the copy. Writes, once the fit is complete:

    `adata.uns[key_added]`
        `components` and `shares` (see :func:`cellfate.get.components`), `fixed_effects`, `draws`, `mode`, `free_energy` (at
        the mode), `log_evidence`, `diagnostics` (status, k-hat, verdict, ...), `params`.
        Of several trees all are of the mixture over them, the mode is that of the tree with the most evidence, and there is
        also `trees`, see :func:`cellfate.get.trees`.
    `adata.obsm[f"{key_added}_effects"]`
        Data frame (n, 2 per component): posterior mean and sd of each component in each cell, link scale.

    Of many responses the tables have a column `response`, `draws` are 200 of each, and there are no effects; in place of the mode
    and the diagnostics `adata.uns[key_added]` has `responses` (see :func:`cellfate.get.responses`), where a response that could
    not be fitted says why. Where all are genes, `adata.varm[f"{key_added}_shares"]` has their shares, a column per component.
    Under ``"negative_binomial"``, 20 responses or more have their dispersions shrunk to a trend over their means.

    Raises
    ------
    DataError
        Where the input breaks the data contract; the message names the key, what was found and what to do.
    NotImplementedError
        For several fates under several trees: fit one fate at a time, or all under one tree.
    Interrupted
        Where the scheduler of `client` went away; the message says how many chunks are in the store.

    Examples
    --------
    >>> import cellfate as cf
    >>> adata = cf.datasets.simulate(60, family="gaussian", rng=0)
    >>> cf.tl.decompose(adata, "fate", family="gaussian", rng=0)
    >>> list(cf.get.components(adata)["component"])
    ['lineage', 'spatial', 'residual']
    """
    model = {
        "engine": engine,
        "rank": rank,
        "device": device,
        "dtype": dtype,
        "method": method,
        "reml": reml,
        "priors": priors,
        "per_fate": per_fate,
    }
    check_kernels(lineage_kernel, spatial_kernel, lengthscale)
    check_adata(adata)
    check_free(adata, key_added)
    check_store(store)
    workers = executor(client)
    if client is not None:
        model["device"] = here(workers.device(device))
    lineage = one_of_one(lineage)
    trees = find_trees(adata, lineage, lineage_kernel)
    check_weights(tree_weights, trees)
    if trees is not None and not isinstance(fate, str):
        raise NotImplementedError(
            "several fates under several trees are not there yet. Fit one fate at a time, each under a key_added of its own, or all "
            "of them under one tree."
        )
    cells = read_cells(
        adata,
        fate if isinstance(fate, str) else None,
        layer=layer,
        family=family,
        formula=formula,
        lineage=lineage if trees is None else trees.ancestries[0],
        lineage_kernel=lineage_kernel,
        spatial=spatial,
        spatial_kernel=spatial_kernel,
        graph=graph,
        niche=niche,
        library_key=library_key,
        groups=groups,
        offset=offset,
        trials=trials,
    )
    cells = _with_specimens(cells, groups, formula, lineage_kernel, library_key)
    components = components_of(
        cells,
        lineage_kernel,
        spatial_kernel,
        lengthscale,
        rank,
        interaction=interaction,
        olre=olre,
        tree="the tree" if trees is None else trees.ancestries[0].label,
    )
    glmm = GLMM(family, components, link=link, **model)  # type: ignore[arg-type]
    params = {
        "fate": fate if isinstance(fate, str) else "many",
        "layer": layer,
        "family": family,
        "link": glmm.family.link,
        "formula": formula,
        "lineage": named(lineage) if trees is None else trees.keys or GIVEN,
        "lineage_kernel": lineage_kernel if lineage is not None else None,
        "n_trees": None if trees is None else len(trees.names),
        "tree_weights": None if trees is None else tree_weights if isinstance(tree_weights, str) else GIVEN,
        "spatial": named(graph_of_field(adata, spatial, graph) if cells.graph is not None else spatial),
        "spatial_kernel": spatial_kernel if spatial is not None else None,
        "lengthscale": lengthscale,
        "graph": named(graph),
        "niche": named(niche),
        "library_key": library_key,
        "groups": list(cells.groups),
        "slopes": list(cells.slopes),
        **noted_groups(groups, cells.groups),
        "interaction": interaction,
        "olre": olre,
        "offset": named(offset),
        "trials": named(trials),
        "levels": cells.levels,
        "n_cells": len(cells.names),
        "n_specimens": len(cells.specimens),
        "version": __version__,
        **model,
        "device": device,
    }
    run = None
    if client is not None or store is not None:
        there = workers.device(device)  # what it is resolved to: results differ between kinds
        told = {name: value for name, value in params.items() if name not in ("version", "levels")}
        run = Run(workers, store, {**told, "device": there.type, "chunk_size": chunk_size}, there)
    if isinstance(fate, str):
        logger.info("%s: %d cells, %s, %s", fate, cells.n, family, " + ".join(c.name for c in components))
        table = None
        if trees is None and run is not None:
            fit = fit_elsewhere(glmm, cells, rng, run)
        elif trees is None:
            fit = glmm.fit(**arguments_of(cells), rng=rng)
        else:
            each = under_each(
                adata,
                cells,
                trees,
                layer=layer,
                family=family,
                lineage_kernel=lineage_kernel,
                library_key=library_key,
                trials=trials,
            )
            fit, table = fit_trees(glmm, each, trees, tree_weights, lineage_kernel, rng, run)
        fit, doubt = with_truncation(fit, components)
        if doubt:
            warnings.warn(doubt, CellfateWarning, stacklevel=2)
        adata = adata.copy() if copy else adata
        write_results(adata, key_added, cells, fit, params)
        if table is not None:
            write_table(adata, key_added, _keys.TREES, table)
    else:
        fates = find_fates(
            adata, fate, layer=layer, min_cells=min_cells, kind=glmm.family.kind, trials=trials, kept=cells.kept
        )
        found = fit_all(glmm, cells, fates, formula, rng, chunk_size, run)
        adata = adata.copy() if copy else adata
        write_many(adata, key_added, found, fates.names if fates.only_genes else None, params)
    return adata if copy else None


def _with_specimens(cells: Cells, groups: Any, formula: str, lineage_kernel: str, library_key: str | None) -> Cells:
    """The specimen as a grouping factor, unless the user chose the groups or put it into the formula.

    A field of its own can also carry the mean of a specimen, as a length-scale beyond its extent: a difference between
    founders, stages or stainings would then be called neighborhood.
    """
    nowhere = cells.coordinates is None and cells.graph is None
    if groups is not None or library_key is None or nowhere or cells.n_specimens < FEWEST_SPECIMENS:
        return cells
    clones = lineage_kernel == "clone" and cells.forest is not None
    if (
        library_key in (*TAKEN, cells.response_name, *columns_of(formula))
        or (clones and _same_split(cells.forest.tree[cells.leaf], cells.specimen))  # type: ignore[union-attr]
    ):
        return cells
    logger.info(
        "each of the %d specimens of obs[%r] gets a random intercept, component %r, so that a difference between whole "
        "specimens is not called neighborhood; groups=[] leaves it out",
        cells.n_specimens,
        library_key,
        library_key,
    )
    return replace(cells, groups={library_key: cells.specimen}, group_levels={library_key: cells.specimens})


def _same_split(one: np.ndarray, other: np.ndarray) -> bool:
    pairs = len(np.unique(np.column_stack([one, other]), axis=0))
    return pairs == len(np.unique(one)) == len(np.unique(other))
