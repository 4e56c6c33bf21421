"""Every name of an AnnData slot, spelled once."""

KEY = "cellfate"  # default of `key_added`
TREE = "tree"
SPATIAL = "spatial"
CONNECTIVITIES = "spatial_connectivities"  # of obsp, as squidpy calls its neighbor graph

PARAMS = "params"
COMPONENTS = "components"
SHARES = "shares"
FIXED_EFFECTS = "fixed_effects"
DRAWS = "draws"
MODE = "mode"
FREE_ENERGY = "free_energy"
LOG_EVIDENCE = "log_evidence"
DIAGNOSTICS = "diagnostics"
ANCESTORS = "ancestors"
MARGINAL_EFFECTS = "marginal_effects"
ASSOCIATIONS = "associations"
COMPARISON = "comparison"
TESTS = "tests"
CHECKS = "checks"
PREDICTIONS = "predictions"
CALIBRATION = "calibration"
PRIOR_SENSITIVITY = "prior_sensitivity"
CONDITIONS = "conditions"
CONDITION_DIFFERENCES = "condition_differences"
CONDITION_EVIDENCE = "condition_evidence"
IDENTIFIABILITY = "cellfate_identifiability"
CORRELATIONS = "cellfate_correlations"
TREES = "trees"  # a row per tree, where there are several of the same cells
RESPONSES = "responses"  # a row per response, where there are many


def effects(key: str) -> str:
    """The `obsm` slot of per-cell effects."""
    return f"{key}_effects"


def shares(key: str) -> str:
    """The `varm` slot of shares, where the responses are genes."""
    return f"{key}_shares"


def residual(key: str) -> str:
    """The `obs` column of residuals; of fates without an order, which have one each, the `obsm` slot."""
    return f"{key}_residual"


def node_attributes(key: str) -> tuple[str, str]:
    """Attributes of the nodes of a tree: posterior mean and sd of the lineage effect."""
    return f"{key}_lineage_mean", f"{key}_lineage_sd"


def missing(tree_key: str) -> str:
    """The `uns` slot that says which cells have no leaf, and what to do with them."""
    return f"{tree_key}_missing"
