"""What the tests of figures share: results to draw, and readers of what was drawn."""

import matplotlib
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


def words_of(figure):
    """Every visible word and where it is printed."""
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]
    ticks = [(tick, sorted(axis.get_view_interval())) for axis in axes for tick in axis.get_major_ticks()]
    beyond = {id(tick.label1) for tick, (low, high) in ticks if not low <= tick.get_loc() <= high}  # not printed
    found = [t for t in figure.findobj(matplotlib.text.Text) if id(t) not in beyond]
    words = [t for t in found if t.get_visible() and t.get_text().strip()]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in words if t.get_figure() is not None]


def assert_legible(figure):
    """No word is printed over another or leaves the page."""
    words = words_of(figure)
    assert words
    for i, (text, box) in enumerate(words):
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
        for other, place in words[:i]:
            assert not box.overlaps(place), (text, other)


ROUGH = "k-hat of leaving cells out is 0.73, above 0.7: elpd_loo is rough"
AT_BOUND = "the mode of lengthscale_spatial is at the bound of what the data can tell; site updates did not settle at 9 of 64 points"


def with_comparison(adata):
    """Five models, of which one has the most evidence and another predicts best; two have one doubt, and one another."""
    both = "lineage + spatial"
    evidence = np.array([-259.7, -261.2, -271.9, -272.2, -282.4])
    relative = np.exp(evidence - evidence.max())
    adata.uns["cellfate"]["comparison"] = pd.DataFrame(
        {
            "model": [both, f"{both} + lineage:spatial", "lineage", "spatial", "none"],
            "log_evidence": evidence,
            "weight": relative / relative.sum(),
            "elpd_loo": [-237.5, -237.3, -258.4, -260.9, -276.3],
            "elpd_difference": [-0.2, 0.0, -21.1, -23.6, -39.0],
            "elpd_error": [1.2, 0.0, 8.3, 6.6, 8.9],
            "status": ["converged", AT_BOUND, "converged", ROUGH, ROUGH],
        }
    )
    return adata
