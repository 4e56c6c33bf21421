"""Published cells with ancestry and position, read from a local folder; nothing is downloaded.

The folder holds one directory per set with `cells.csv` (one row per leaf: `cell_id`, `sample`, coordinates, traits), the tree as
`tree.nwk`, or several as `trees.nwk` with their samples in `trees_index.csv`, and for some a matrix of genes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from cellfate import _keys
from cellfate.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData

VARIABLE = "CELLFATE_DATA"


@dataclass(frozen=True)
class Source:
    """Where a set comes from and what is in it."""

    citation: str
    repository: str  # with the commit and the files that the set was made from
    coordinates: tuple[str, ...] = ("x", "y", "z")
    slot: str = _keys.SPATIAL
    matrix: str | None = None  # "expression.csv" or "counts.mtx.gz"


SOURCES = {
    "ascidian_embryos": Source(
        "Guignard, Fiuza et al., Contact area-dependent cell communication and the morphological invariance of ascidian "
        "embryogenesis, Science 369 (2020) eaar5663",
        "mastodon-sc/mastodon-example-data at b6ea3af527fe, astec/Pm0?.mastodon",
    ),
    "celegans_reporter_embryos": Source(
        "LIVE_tools, Murray laboratory, University of Pennsylvania (2025), strain JIM767",
        "johnmurraylab/LIVE_tools at 07b8a2e4996d, sample_data/JIM767_25/CD*.csv",
    ),
    "celegans_gene_atlas": Source(
        "Murray et al., Multidimensional regulation of gene expression in the C. elegans embryo, Genome Research 22 (2012) "
        "1282-1294; positions and tree: LIVE_tools, Murray laboratory (2025)",
        "balicea/DevoWorm at be23d0f287ed, Gene Expression Data/supp-data-genome-research-2012.xls; "
        "johnmurraylab/LIVE_tools at 07b8a2e4996d, sample_data/JIM767_25/CD20250419_JIM767_pha4GFP_25_L4.csv",
        matrix="expression.csv",
    ),
    "intmemoir_colonies": Source(
        "Chow, Budde, Granados et al., Imaging cell lineage with a synthetic digital recording system, Science 372 (2021) "
        "eabb3099",
        "raphael-group/intmemoir-processed-data at 44ea940de03d, processed_intmemoir_data/s*c*/",
        coordinates=("x", "y"),
    ),
    "fly_hemibrain_hemilineages": Source(
        "Scheffer et al., A connectome and analysis of the adult Drosophila central brain, eLife 9 (2020) e57443; Schlegel et "
        "al., Whole-brain annotation and multi-connectome cell typing of Drosophila, Nature 634 (2024) 139-152",
        "flyconnectome/flywire_annotations at 27e0689933b2, supplemental_files/Supplemental_file3, file4 and file5",
    ),
    "mouse_blastocysts": Source(
        "Saiz et al., Asynchronous fate decisions by single cells collectively ensure consistent lineage composition in the "
        "mouse blastocyst, Nature Communications 7 (2016) 13463; Saiz et al., eLife 9 (2020) e56079",
        "nestorsaiz/saiz-et-al_2020 at 793a29145b98, data/processed/ncoms-lms-processed.csv",
    ),
    "kp_tracer_large_tree": Source(
        "Yang, Jones et al., Lineage tracing reveals the phylodynamics, plasticity, and paths of tumor evolution, Cell 185 "
        "(2022) 1905-1923",
        "raphael-group/sc-mail-experiments at 2671297df12d, Real_biodata/kptracer/result_trees/published/casshybrid.nwk",
        coordinates=(),
    ),
    "larry_clones_expression": Source(
        "Weinreb et al., Lineage tracing on transcriptional landscapes links state to fate during differentiation, Science 367 "
        "(2020) eaaw3381",
        "ShouWenWang-Lab/cospar at a06d640cb08f, tests/data/test_adata_preprocessed.h5ad",
        coordinates=("emb_x", "emb_y"),
        slot="X_emb",  # a layout of the expression graph: its neighbors are no neighborhood
        matrix="counts.mtx.gz",
    ),
    "mcf10a_timelapse": Source(
        "Mohammadi et al., A lineage tree-based hidden Markov model quantifies cellular heterogeneity and plasticity, "
        "Communications Biology 5 (2022), doi 10.1038/s42003-022-04208-9",
        "meyer-lab/tHMM at 2aa19a3bc4eb, lineage/data/MCF10A/*.csv",
        coordinates=("x", "y"),
    ),
}


def ascidian_embryos(path: str | Path | None = None) -> AnnData:
    """1,793 cells of 5 ascidian embryos: tracked divisions, 3-D, 21 fates by cell name, size and timing as measured."""
    return _load("ascidian_embryos", path)


def celegans_reporter_embryos(path: str | Path | None = None) -> AnnData:
    """3,434 cells of 9 C. elegans embryos: Sulston tree, 3-D, a reporter measured in the same animals."""
    return _load("celegans_reporter_embryos", path)


def celegans_gene_atlas(path: str | Path | None = None) -> AnnData:
    """444 cells of one C. elegans embryo: Sulston tree, 3-D, and in `X` 62 gene reporters of other embryos, by cell name."""
    return _load("celegans_gene_atlas", path)


def intmemoir_colonies(path: str | Path | None = None) -> AnnData:
    """1,441 mouse stem cells of 102 colonies: filmed trees, 2-D, ten recorder sites that know no neighborhood."""
    return _load("intmemoir_colonies", path)


def fly_hemibrain_hemilineages(path: str | Path | None = None) -> AnnData:
    """11,993 neurons of one fly brain: lineage and hemilineage as the tree, 3-D cell bodies, synapse counts."""
    return _load("fly_hemibrain_hemilineages", path)


def mouse_blastocysts(path: str | Path | None = None) -> AnnData:
    """11,580 nuclei of 139 mouse embryos: litter and embryo as the tree, 3-D, fates and two markers."""
    return _load("mouse_blastocysts", path)


def kp_tracer_large_tree(path: str | Path | None = None) -> AnnData:
    """21,108 cells of one lung tumor and its metastases: a recorder tree with large polytomies, no coordinates."""
    return _load("kp_tracer_large_tree", path)


def larry_clones_expression(path: str | Path | None = None) -> AnnData:
    """781 blood progenitors of 339 barcoded clones, in `X` counts of 2,481 genes.

    There is no tissue: `obsm["X_emb"]` is a layout computed from expression, not a place.
    """
    return _load("larry_clones_expression", path)


def mcf10a_timelapse(path: str | Path | None = None) -> AnnData:
    """638 breast epithelial cells of 192 filmed lineages in 16 fields: 2-D, motility and cycle times under growth factors."""
    return _load("mcf10a_timelapse", path)


def _load(name: str, path: str | Path | None) -> AnnData:
    from anndata import AnnData

    source, folder = SOURCES[name], _folder(name, path)
    table = _read(folder / "cells.csv", cell_id=str, sample=str).set_index("cell_id")
    missing = [column for column in ("sample", *source.coordinates) if column not in table]
    if missing:
        raise DataError(f"{folder / 'cells.csv'} has no column {missing[0]!r}. Get the set again; {_where(source)}")
    obs = table.drop(columns=list(source.coordinates))
    obs.index.name = None
    for column in obs:
        if obs[column].dtype == object or column == "sample":
            obs[column] = obs[column].astype("category")
    adata = AnnData(obs=obs, **_genes(folder, source, table.index))
    if source.coordinates:
        adata.obsm[source.slot] = table[list(source.coordinates)].to_numpy(dtype=float)
    adata.uns[_keys.TREE] = _trees(folder)
    adata.uns["source"] = source.citation
    return adata


def _read(file: Path, **dtype: type) -> pd.DataFrame:
    """A table in which only an empty field is missing: NA and None are names that cells, genes and types do have."""
    return pd.read_csv(file, dtype=dtype, keep_default_na=False, na_values=[""])


def _folder(name: str, path: str | Path | None) -> Path:
    """The directory of one set, or where its data can be had."""
    source = SOURCES[name]
    root = path if path is not None else os.environ.get(VARIABLE)
    if not root:
        raise DataError(
            f"{name} is read from a local folder, and none was given. Pass `path`, or set {VARIABLE}, to the folder that "
            f"holds {name}/cells.csv; {_where(source)}"
        )
    folder = Path(root).expanduser() / name
    absent = [file for file in ("cells.csv", source.matrix) if file and not (folder / file).is_file()]
    if not any((folder / file).is_file() for file in ("tree.nwk", "trees.nwk")):
        absent.append("tree.nwk")
    if absent:
        raise DataError(f"{name} has no {absent[0]} in {folder}. Put it there, or correct `path`; {_where(source)}")
    return folder


def _where(source: Source) -> str:
    return f"the published data: {source.citation}; source repository github.com/{source.repository}."


def _trees(folder: Path) -> str | dict[str, str]:
    if (folder / "tree.nwk").is_file():
        return (folder / "tree.nwk").read_text().strip()
    lines = (folder / "trees.nwk").read_text().splitlines()
    index = _read(folder / "trees_index.csv", sample=str)
    return {sample: lines[line - 1].strip() for line, sample in zip(index["line"], index["sample"], strict=True)}


def _genes(folder: Path, source: Source, cells: Sequence[str]) -> dict[str, object]:
    """The matrix of genes, as what `AnnData` takes; its rows in the order of the cells."""
    if source.matrix is None:
        return {}
    if source.matrix.endswith(".csv"):
        table = _read(folder / source.matrix, cell_id=str).set_index("cell_id").loc[list(cells)]
        return {"X": table.to_numpy(dtype="float32"), "var": pd.DataFrame(index=table.columns.astype(str))}
    from scipy.io import mmread

    genes = _read(folder / "genes.csv", gene=str)["gene"]
    return {"X": mmread(folder / source.matrix).tocsr().astype("float32"), "var": pd.DataFrame(index=genes.to_numpy())}
