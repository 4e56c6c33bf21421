"""Cells to try things on: simulated with a known truth, or published and read from a local folder."""

from cellfate.datasets.loaders import (
    ascidian_embryos,
    celegans_gene_atlas,
    celegans_reporter_embryos,
    fly_hemibrain_hemilineages,
    intmemoir_colonies,
    kp_tracer_large_tree,
    larry_clones_expression,
    mcf10a_timelapse,
    mouse_blastocysts,
)
from cellfate.datasets.simulate import simulate

__all__ = [
    "ascidian_embryos",
    "celegans_gene_atlas",
    "celegans_reporter_embryos",
    "fly_hemibrain_hemilineages",
    "intmemoir_colonies",
    "kp_tracer_large_tree",
    "larry_clones_expression",
    "mcf10a_timelapse",
    "mouse_blastocysts",
    "simulate",
]


def __dir__() -> list[str]:
    return __all__
