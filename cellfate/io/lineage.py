"""Ancestry from AnnData: the tree is found, its leaves are matched with the cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cellfate import _keys
from cellfate._runtime import logger
from cellfate.errors import DataError
from cellfate.io.columns import among, check_present, column, factorize, instead
from cellfate.trees.convert import to_forest
from cellfate.trees.forest import Forest, examples

if TYPE_CHECKING:
    from anndata import AnnData

POLICIES = ("error", "drop", "isolate")

AGREE = "Rename the leaves or the cells so that they agree."


@dataclass(frozen=True, eq=False)
class Ancestry:
    """A forest, and what to do with the cells that are not in it."""

    forest: Forest
    label: str  # how to call it in a message
    by_specimen: bool = False  # it came as a dict, whose keys are specimens
    clones: bool = False  # it came as clone labels
    policy: str = "error"  # for the cells in `missing`
    missing: frozenset[str] = frozenset()
    isolated_depth: float = 0.0
    one_of: int = 1  # trees of the same cells


def looks_like_newick(value: Any) -> bool:
    """Is this what :func:`cellfate.pp.set_tree` stores: Newick text, or a dict of it?"""
    if isinstance(value, Mapping):
        return bool(value) and all(not isinstance(text, Mapping) and looks_like_newick(text) for text in value.values())
    return isinstance(value, str) and value.rstrip().endswith(";")


def find_ancestry(adata: AnnData, lineage: Any, lineage_kernel: str) -> Ancestry:
    """The forest that `lineage` means: the key of a tree or of clone labels, or the tree itself."""
    if isinstance(lineage, Ancestry):
        return lineage
    if not isinstance(lineage, str):
        return Ancestry(to_forest(lineage), "the tree", _by_specimen(lineage))
    obst = getattr(adata, "obst", {})
    clones = lineage_kernel == "clone"
    if lineage in obst:
        tree, label = obst[lineage], f"tree obst[{lineage!r}]"
        if tree.number_of_nodes() == 0:
            raise DataError(
                f"{label} is empty: none of the {adata.n_obs} cells is in it. Run `cf.pp.set_tree` or take "
                "lineage=None."
            )
    elif lineage in adata.uns:
        tree, label = _plain(adata.uns[lineage]), f"tree uns[{lineage!r}]"
    elif "(" in lineage or lineage.rstrip().endswith(";"):
        return Ancestry(to_forest(lineage), "the tree")
    elif obst and lineage == getattr(adata, "label", None):  # one tree per clone, as TreeData labels them in obs
        forest = _read({name: obst[name] for name in obst if obst[name].number_of_nodes()}, "trees obst")
        return Ancestry(forest, "trees obst")
    elif clones and lineage in adata.obs.columns:
        return Ancestry(_clones(adata, lineage), f"clone labels obs[{lineage!r}]", clones=True)
    else:
        raise _no_tree(adata, lineage, obst, clones)
    policy, missing, depth = _missing_cells(adata, lineage)
    return Ancestry(_read(tree, label), label, _by_specimen(tree), policy=policy, missing=missing, isolated_depth=depth)


def match(ancestry: Ancestry, names: np.ndarray, *, prune: bool = True) -> tuple[Forest, np.ndarray, np.ndarray]:
    """Leaves to cells.

    Returns the forest on these cells only (whole, without `prune`), the node (n_kept,) of each kept cell, and which cells are kept (n_obs,).
    """
    forest, label = ancestry.forest, ancestry.label
    has_leaf = among(names, forest.names[forest.leaves])
    unknown = ~has_leaf & ~among(names, ancestry.missing)
    if not has_leaf.any():
        raise DataError(f"{no_leaf(forest, names, ~has_leaf, label)} {AGREE}")
    if unknown.any():
        raise DataError(
            f"{no_leaf(forest, names, unknown, label)} "
            "Run `cf.pp.set_tree(adata, tree, missing='drop')` to leave those cells out of fits, or "
            "missing='isolate' to give them ancestors of their own."
        )
    extra = forest.n_leaves - int(has_leaf.sum())
    if extra and prune:  # unobserved relatives: the covariance of the others is the same without them
        logger.info("%s: %d of %d leaves are not among the cells and are left out.", label, extra, forest.n_leaves)
        forest = forest.prune(names[has_leaf])
    _check_separates(forest, label)
    if ancestry.policy == "isolate" and not has_leaf.all():
        alone = names[~has_leaf]
        tree_names = (*forest.tree_names, *alone)
        forest = replace(Forest.join([forest, _isolated(alone, ancestry.isolated_depth)]), tree_names=tree_names)
        has_leaf = np.ones(len(names), dtype=bool)
    return forest, forest.nodes_of(names[has_leaf]), has_leaf


def no_leaf(forest: Forest, names: np.ndarray, without: np.ndarray, label: str) -> str:
    """Say which cells have no leaf, and what may be the matter."""
    count = int(without.sum())
    text = (
        f"{count} of {len(names)} cells have no leaf in the {label.removeprefix('the ')}: {examples(names[without])}."
    )
    internal = set(forest.names[~forest.is_leaf])
    ancestors = [name for name in names[without] if name in internal]
    if ancestors:
        text += (
            f" {len(ancestors)} of them are internal nodes ({examples(ancestors)}): give an observed ancestor a leaf "
            "of its own, on a branch of length 0."
        )
    if count == len(names):
        text += f" Its leaves are named like {examples(forest.names[forest.leaves[:3]])}; leaves have to be obs_names."
    return text


def check_specimens(
    forest: Forest,
    leaf: np.ndarray,
    names: np.ndarray,
    specimen: np.ndarray,
    specimens: tuple[str, ...],
    *,
    keys: tuple[str, ...],
    library_key: str,
) -> None:
    """A tree that was given for a specimen holds cells of that specimen."""
    if not set(keys) & set(specimens):
        raise DataError(
            f"The trees come by specimen, {examples(dict.fromkeys(keys))}, but none of these is in "
            f"obs[{library_key!r}], which has {examples(specimens)}. Name the trees after the specimens; trees of "
            "clones go into a list, or into one Newick text."
        )
    own = np.array(forest.tree_names, dtype=object)[forest.tree[leaf]]
    theirs = np.array(specimens, dtype=object)[specimen]
    wrong = np.flatnonzero(own != theirs)
    if wrong.size:
        shown = examples(f"{names[i]}: tree {own[i]}, {library_key} {theirs[i]}" for i in wrong[:6])
        raise DataError(
            f"{wrong.size} of {len(names)} cells are in the tree of another specimen than obs[{library_key!r}] says: "
            f"{shown}. Correct the column or the names of the trees."
        )


def _plain(value: Any) -> Any:
    """Text as it was before it went through a file."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return str(value) if isinstance(value, str) else value


def _by_specimen(tree: Any) -> bool:
    return isinstance(tree, Mapping) and not {"parent", "child"} <= set(tree)  # those are the columns of an edge table


def _read(tree: Any, label: str) -> Forest:
    try:
        return to_forest(tree)
    except DataError as e:
        raise DataError(f"{label}: {e}") from e


def _missing_cells(adata: AnnData, lineage: str) -> tuple[str, frozenset[str], float]:
    """What `set_tree` noted about cells without a leaf."""
    slot = _keys.missing(lineage)
    if slot not in adata.uns:
        return "error", frozenset(), 0.0
    note = adata.uns[slot]
    if not isinstance(note, Mapping) or "cells" not in note or str(note.get("policy")) not in POLICIES:
        raise DataError(
            f"uns[{slot!r}] is no note about cells without a leaf (a dict with `policy` and `cells`). Remove it, or "
            "run `cf.pp.set_tree` again."
        )
    return (
        str(note["policy"]),
        frozenset(str(name) for name in np.atleast_1d(note["cells"])),
        float(note.get("depth", 0.0)),
    )


def _no_tree(adata: AnnData, lineage: str, obst: Mapping[str, Any], clones: bool) -> DataError:
    if lineage in adata.obs.columns and not clones:
        return DataError(f"lineage {lineage!r} is an obs column, not a tree. Clone labels need lineage_kernel='clone'.")
    trees = [*obst, *(key for key, value in adata.uns.items() if looks_like_newick(_plain(value)))]
    places = "adata.obst or adata.uns" if obst else "adata.uns"
    found = instead(lineage, trees) if trees else "there is no tree at all"
    text = f"lineage: there is no tree {lineage!r} in {places}; {found}"
    if clones:
        text += f", and no obs column of that name; {instead(lineage, adata.obs.columns)}"
    return DataError(
        f"{text}. Run `cf.pp.set_tree(adata, tree, key_added={lineage!r})`, give the tree itself, or take "
        "lineage=None to leave ancestry out."
    )


def _clones(adata: AnnData, key: str) -> Forest:
    """Every clone a root with its cells as leaves, one unit below."""
    labels, label = column(adata, key, "lineage"), f"clone labels obs[{key!r}]"
    check_present(labels, label, "Leave those cells out, or give each a label of its own: a clone of one.")
    codes, levels = factorize(labels, label)
    if len(levels) == 1:
        raise DataError(
            f"{label} have one level: all {len(codes)} cells are clone {levels[0]!r}. Clones tell nothing apart here: "
            "take lineage=None."
        )
    order = np.argsort(codes, kind="stable")
    root = np.cumsum(np.bincount(codes)) + np.arange(len(levels))  # after its cells, and the clones before
    leaf = np.arange(len(codes)) + codes[order]
    n_nodes = len(codes) + len(levels)
    parent, length = np.full(n_nodes, -1), np.zeros(n_nodes)
    names = np.full(n_nodes, "", dtype=object)
    parent[leaf], length[leaf], names[leaf] = root[codes[order]], 1.0, adata.obs_names.to_numpy()[order]
    return Forest(parent, length, names, levels)


def _isolated(names: np.ndarray, depth: float) -> Forest:
    """Cells with no known relative: a tree each, as deep as the others are on average."""
    k = len(names)
    parent, length = np.full(2 * k, -1), np.zeros(2 * k)
    labels = np.full(2 * k, "", dtype=object)
    parent[::2], length[::2], labels[::2] = np.arange(1, 2 * k, 2), depth, names
    return Forest(parent, length, labels, tuple(names))


def _check_separates(forest: Forest, label: str) -> None:
    """At least one branch has cells both below and beside it."""
    below = np.append(0, np.cumsum(forest.is_leaf))
    count = below[1:] - below[forest.start]  # leaves below each node
    if not ((forest.branch_length > 0) & (count < forest.n_leaves)).any() and forest.n_leaves > 1:
        raise DataError(
            f"{label}: no branch of length above 0 tells any of its {forest.n_leaves} cells from the others. "
            "Give the tree branch lengths, or none for unit lengths."
        )
