"""Preparation: the tree is checked and stored, covariates are split, and what the cells can tell is known before a fit."""

from cellfate.pp.identifiability import identifiability
from cellfate.pp.set_tree import set_tree
from cellfate.pp.within_between import within_between

__all__ = ["identifiability", "set_tree", "within_between"]


def __dir__() -> list[str]:
    return __all__
