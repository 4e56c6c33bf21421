"""Kernels by name: ancestry, neighborhood, groups, and covariances that are given."""

from cellfate.kernels.base import Component, Given, Kernel
from cellfate.kernels.groups import Intercepts
from cellfate.kernels.lineage import Brownian, Clone, EarlyBurst, OrnsteinUhlenbeck, Pagel
from cellfate.kernels.spatial import Matern12, Matern32, Matern52, Rbf

__all__ = [
    "Brownian",
    "Clone",
    "Component",
    "EarlyBurst",
    "Given",
    "Intercepts",
    "Kernel",
    "Matern12",
    "Matern32",
    "Matern52",
    "OrnsteinUhlenbeck",
    "Pagel",
    "Rbf",
]
