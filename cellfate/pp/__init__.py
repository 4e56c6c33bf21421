"""Preparation: the tree is checked and stored."""

from cellfate.pp.set_tree import set_tree

__all__ = ["set_tree"]
