"""Kernels by name: ancestry, neighborhood, niche, groups, and covariances that are given."""

from cellfate.kernels.base import Component, Given, Kernel
from cellfate.kernels.graph import Composition, Graph
from cellfate.kernels.groups import CorrelatedSlopes, Intercepts, Slopes
from cellfate.kernels.lineage import Brownian, Clone, EarlyBurst, OrnsteinUhlenbeck, Pagel
from cellfate.kernels.product import Product
from cellfate.kernels.spatial import Matern12, Matern32, Matern52, Rbf

__all__ = [
    "Brownian",
    "Clone",
    "Component",
    "Composition",
    "CorrelatedSlopes",
    "EarlyBurst",
    "Given",
    "Graph",
    "Intercepts",
    "Kernel",
    "Matern12",
    "Matern32",
    "Matern52",
    "OrnsteinUhlenbeck",
    "Pagel",
    "Product",
    "Rbf",
    "Slopes",
]
