"""Tools: what is estimated from cells, a tree and positions."""

from cellfate.tl.decompose import decompose

__all__ = ["decompose"]
