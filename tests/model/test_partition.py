"""Shares of a total, also where there is none."""

from types import SimpleNamespace

import numpy as np
import pytest

from cellfate.inference.report import diagnose, doubts_of
from cellfate.model.partition import rows


@pytest.mark.filterwarnings("error")
def test_of_nothing_there_are_no_shares():
    """Not a number, and the fit says so."""
    parts = {"lineage": np.array([0.0, 0.3, 0.2]), "spatial": np.array([0.0, 0.1, 0.2])}
    variances, shares = rows(SimpleNamespace(components=()), "fate", {"realized": parts})
    assert variances["variance"] == pytest.approx([0.5 / 3, 0.1])
    assert np.isnan(shares["share"]).all()
    mode = SimpleNamespace(converged=True, at_bound=(), free_energy=-1.0, evaluations=1)
    facts = {"pareto_k": 0.1, "interpolation_error": 0.0, "effective_draws": 1e3, "unsettled": 0, "evaluations": 9}
    assert doubts_of(mode, SimpleNamespace(**facts), parts, []) == ["a result is not finite: do not use this fit"]
    some = {name: x[1:] for name, x in parts.items()}
    assert rows(SimpleNamespace(components=()), "fate", {"realized": some})[1]["share"] == pytest.approx([0.625, 0.375])
    assert not doubts_of(mode, SimpleNamespace(**facts), some, [])
    verdict = diagnose(mode, SimpleNamespace(**facts), parts, [])["verdict"]
    assert verdict == "ancestry and neighborhood explain nothing that could be divided"
