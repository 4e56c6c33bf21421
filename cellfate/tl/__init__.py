"""Tools: what is estimated from cells, a tree and positions."""

from cellfate.tl.associate import associate
from cellfate.tl.by_condition import by_condition
from cellfate.tl.check import check
from cellfate.tl.compare import compare
from cellfate.tl.component_tests import test_components
from cellfate.tl.correlate import correlate
from cellfate.tl.decompose import decompose
from cellfate.tl.marginal_effects import marginal_effects
from cellfate.tl.mundlak import mundlak
from cellfate.tl.predict import predict
from cellfate.tl.prior_sensitivity import prior_sensitivity

__all__ = [
    "associate",
    "by_condition",
    "check",
    "compare",
    "correlate",
    "decompose",
    "marginal_effects",
    "mundlak",
    "predict",
    "prior_sensitivity",
    "test_components",
]


def __dir__() -> list[str]:
    return __all__
