"""Preparation: the tree is checked and stored, and what the cells can tell is known before a fit."""

from cellfate.pp.identifiability import identifiability
from cellfate.pp.set_tree import set_tree

__all__ = ["identifiability", "set_tree"]
