"""What the tests of figures share: results to draw, and readers of what was drawn."""

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection

import cellfate as cf
from tests.synthetic import synthetic_result


def two_responses():
    first, second = synthetic_result(), synthetic_result(response="marker", seed=1)
    for table in ("components", "shares"):
        both = [adata.uns["cellfate"][table] for adata in (first, second)]
        first.uns["cellfate"][table] = pd.concat(both, ignore_index=True)
    return first


def gaussian():
    """A result with a residual."""
    adata = synthetic_result(family="gaussian", link="identity")
    for table in ("components", "shares"):
        adata.uns["cellfate"][table]["component"] = adata.uns["cellfate"][table]["component"].replace(
            "fixed", "residual"
        )
    adata.uns["cellfate"]["draws"] = cf.get.draws(adata).rename(columns={"share_fixed": "share_residual"})
    return adata


def whiskers(ax):
    """Ends of every horizontal line, from top to bottom."""
    lines = [line for c in ax.collections if isinstance(c, LineCollection) for line in c.get_segments()]
    return np.array([[line[0][0], line[1][0]] for line in sorted(lines, key=lambda line: line[0][1])])


def texts(ax):
    return [text.get_text() for text in ax.texts]
