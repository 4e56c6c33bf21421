"""Wrong input, a row each: what was done to a good embryo, and what the error has to say about it.

To add one, add a row. `READ` is about arguments and slots that a fit reads, and runs through every door in `DOORS`;
`SET_TREE` is about trees on their way in. A row ends with the pieces of text that have to be in the message.
"""

import networkx as nx
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cellfate import DataError
from cellfate.io.anndata import read_cells
from cellfate.pp import set_tree
from cellfate.tl import decompose
from tests.embryo import HALVES, N, embryo, half_tree, one_tree, trees, unchanged

DOORS = [read_cells, decompose]


def obs(key, values, cells=slice(None)):
    """Change a column."""

    def change(adata):
        column = (
            adata.obs[key].astype(object) if key in adata.obs else pd.Series(0, index=adata.obs_names, dtype=object)
        )
        column.iloc[cells] = values
        adata.obs[key] = column.infer_objects()

    return change


def derived(key, of):
    def change(adata):
        adata.obs[key] = of(adata.obs)

    return change


def positions(values, cells=slice(None), dtype=float):
    def change(adata):
        xy = np.array(adata.obsm["spatial"], dtype=dtype)
        xy[cells] = values
        adata.obsm["spatial"] = xy

    return change


def uns(key, value):
    def change(adata):
        adata.uns[key] = value

    return change


def ring(adata, key="spatial_connectivities", weight=1.0):
    """Each cell beside the next."""
    w = sparse.csr_array(weight * (np.roll(np.eye(adata.n_obs), 1, 0) + np.roll(np.eye(adata.n_obs), -1, 0)))
    adata.obsp[key] = w


def some_weight(value):
    def change(adata):
        ring(adata)
        adata.obsp["spatial_connectivities"].data[:3] = value

    return change


def obsm(key, value):
    def change(adata):
        adata.obsm[key] = np.array(value)

    return change


def chain(*changes):
    def change(adata):
        for one in changes:
            one(adata)

    return change


def nothing(adata):
    pass


def duplicate_names(adata):
    names = adata.obs_names.tolist()
    names[1] = names[0]
    adata.obs.index = names


def only(n):
    def change(adata):
        adata._inplace_subset_obs(np.arange(n))

    return change


GAUSSIAN = {"fate": "size", "family": "gaussian"}
POISSON = {"fate": "count", "family": "poisson"}
BINOMIAL = {"fate": "edited", "family": "binomial", "trials": "sites"}
BY_HALF = {"lineage": "trees", "library_key": "half"}
TWO_TREES = uns("trees", trees())
GRAPH = {"spatial_kernel": "graph"}
TYPES = np.eye(4)[np.random.default_rng(0).integers(4, size=N)]

# fmt: off
READ = [
    # what is not there
    ("fate is no column", nothing, {"fate": "fates"},
     ["fate 'fates' is neither an obs column (similar: 'fate', 'sites')", "nor a gene"]),
    ("fate is no gene", nothing, {"fate": "elt2"}, ["nor a gene (similar: 'elt-2')"]),
    ("fate is both", obs("elt-2", 1), {"fate": "elt-2"}, ["fate 'elt-2' is both an obs column and a gene", "Rename"]),
    ("fate is a matrix", nothing, {"fate": "spatial"}, ["'spatial' is a matrix in obsm", "Put its columns into obs"]),
    ("fate is no name", nothing, {"fate": 3}, ["fate is of type int", "wanted the name"]),
    ("no tree", nothing, {"lineage": "trees"},
     ["no tree 'trees' in adata.uns; similar: 'tree'", "set_tree", "lineage=None"]),
    ("no tree at all", lambda a: a.uns.pop("tree"), {}, ["no tree 'tree'", "there is no tree at all"]),
    ("tree is a column", nothing, {"lineage": "clone"}, ["'clone' is an obs column", "lineage_kernel='clone'"]),
    ("no clone labels", nothing, {"lineage": "clones", "lineage_kernel": "clone"},
     ["no obs column of that name; similar: 'clone'"]),
    ("tree slot holds a list", nothing, {"lineage": "colors"}, ["tree uns['colors']", "no Newick"]),
    ("no coordinates", nothing, {"spatial": "spatail"}, ["obsm['spatail']; similar: 'spatial'", "spatial=None"]),
    ("no library column", nothing, {"library_key": "halves"},
     ["library_key: there is no obs column 'halves'; similar: 'half'"]),
    ("no group column", nothing, {"groups": "btch"}, ["groups: there is no obs column 'btch'; similar: 'batch'"]),
    ("no offset column", nothing, {"offset": "logsize"},
     ["offset: there is no obs column 'logsize'; similar: 'log_size'"]),
    ("no trials column", nothing, BINOMIAL | {"trials": "site"},
     ["trials: there is no obs column 'site'; similar: 'sites'"]),
    ("no component", nothing, {"lineage": None, "spatial": None}, ["lineage, spatial and groups are all None"]),
    ("no cells", only(0), {}, ["adata has no cells (n_obs = 0)"]),
    ("names twice", duplicate_names, {}, ["1 names are shared by 2 of 24 cells: 'c0'", "obs_names_make_unique"]),
    # families
    ("unknown family", nothing, {"family": "binary"}, ["unknown family 'binary'", "bernoulli"]),
    ("family is no name", nothing, {"family": None}, ["family is of type NoneType"]),
    # trees against cells
    ("cell without leaf", uns("tree", half_tree(0, N - 2) + ";"), {},
     ["2 of 24 cells have no leaf in the tree uns['tree']: 'c22', 'c23'", "missing='drop'", "missing='isolate'"]),
    ("other names", uns("tree", one_tree().replace("c", "cell")), {},
     ["24 of 24 cells have no leaf", "leaves are named like 'cell0'", "leaves have to be obs_names"]),
    ("cells are ancestors", uns("tree", one_tree().replace("c3:", "(a:1,b:1)c3:")), {},
     ["1 of 24 cells have no leaf", "1 of them are internal nodes ('c3')", "branch of length 0"]),
    ("leaf twice", uns("tree", one_tree().replace("c3:", "c2:")), {},
     ["tree uns['tree']", "1 leaf names occur more than once", "'c2'"]),
    ("unreadable tree", uns("tree", one_tree().replace("(", "", 1)), {}, ["tree uns['tree']", "closing parentheses"]),
    ("negative length", uns("tree", one_tree().replace("c3:1.0", "c3:-1")), {},
     ["1 of 49 branch lengths are negative", "'c3'"]),
    ("no lengths above 0", uns("tree", one_tree().replace(":1.0", ":0")), {},
     ["no branch of length above 0", "24 cells"]),
    ("foreign note", uns("tree_missing", 3), {}, ["uns['tree_missing'] is no note"]),
    ("tree of nothing", nothing, {"lineage": 3}, ["cannot be read from int"]),
    ("one clone", obs("clone", "k0"), {"lineage": "clone", "lineage_kernel": "clone"},
     ["clone labels obs['clone'] have one level", "24 cells", "'k0'"]),
    ("clone unknown", obs("clone", None, [2, 5]), {"lineage": "clone", "lineage_kernel": "clone"},
     ["clone labels obs['clone'] is NaN in 2 of 24 cells: 'c2', 'c5'"]),
    ("clones of one", obs("clone", list(range(N))), {"lineage": "clone", "lineage_kernel": "clone"},
     ["as many levels as cells (24)", "one yes or no per cell"]),
    # specimens
    ("specimen unknown", obs("half", np.nan, [1]), {"library_key": "half"},
     ["library_key obs['half'] is NaN in 1 of 24 cells: 'c1'"]),
    ("specimen of one", nothing, {"library_key": "log_size"},
     ["as many specimens as cells (24)", "nobody has a neighbor"]),
    ("trees of other specimens", chain(TWO_TREES, obs("half", np.repeat(["L", "R"], N // 2))), BY_HALF,
     ["by specimen, 'left', 'right'", "none of these is in obs['half'], which has 'L', 'R'", "a list"]),
    ("cells in another's tree", chain(TWO_TREES, obs("half", "right", [0, 3])), BY_HALF,
     ["2 of 24 cells are in the tree of another specimen", "c0: tree left, half right", "c3: tree left"]),
    ("specimen without tree", uns("trees", {"left": trees()["left"]}), BY_HALF,
     ["12 of 24 cells have no leaf", "'c12'"]),
    ("levels that read the same", obs("half", [1, "1"] * (N // 2)), {"library_key": "half"}, ["read the same: '1'"]),
    # coordinates
    ("NaN coordinates", positions(np.nan, ([2, 3], [0, 1])), {},
     ["coordinates obsm['spatial'] is NaN in 2 of 24 cells: 'c2', 'c3'"]),
    ("infinite coordinates", positions(np.inf, [4]), {}, ["is infinite in 1 of 24 cells: 'c4'"]),
    ("1-D coordinates", nothing, {"spatial": np.arange(N)}, ["coordinates are 1-D (shape (24,))", "(n, 2) or (n, 3)"]),
    ("one column", nothing, {"spatial": np.zeros((N, 1))}, ["coordinates are 1-D (shape (24, 1))"]),
    ("4-D coordinates", nothing, {"spatial": np.zeros((N, 4))}, ["coordinates are 4-D (shape (24, 4))"]),
    ("ragged coordinates", nothing, {"spatial": [[0, 1]] * (N - 1) + [[0]]},
     ["coordinates has rows of different lengths"]),
    ("coordinates too short", nothing, {"spatial": np.zeros((5, 2))}, ["coordinates has 5 rows for 24 cells"]),
    ("coordinates of others", nothing,
     {"spatial": pd.DataFrame({"x": range(N), "y": 0}, index=[f"d{i}" for i in range(N)])},
     ["24 of 24 cells are not in it: 'c0'", "adata.obs_names"]),
    ("text coordinates", positions("here", dtype=object), {},
     ["coordinates obsm['spatial'] holds no numbers but text"]),
    ("all at one point", positions([3, 4]), {}, ["have all 24 cells at one point, (3, 4)"]),
    ("specimen at one point", positions([3, 4], slice(0, 12)), {"library_key": "half"},
     ["all cells in 1 of 2 specimens of obs['half'], 'left'", "at one point"]),
    # bernoulli
    ("NaN fate", obs("fate", None, [0, 6]), {},
     ["fate obs['fate'] is NaN in 2 of 24 cells: 'c0', 'c6'", "`adata[adata.obs['fate'].notna()]`"]),
    ("one level", obs("fate", "skin"), {}, ["one level: it is 'skin' in all 24 cells"]),
    ("a level in one cell", obs("fate", ["skin"] + ["neuron"] * (N - 1)), {},
     ["1 cell of level 'skin' ('c0') against 23 of 'neuron'", "At least 2"]),
    ("three levels", nothing, {"fate": "stage"},
     ["has 3 levels", "wants two", "'early' in 8, 'late' in 8, 'mid' in 8", "is_it"]),
    ("counts as bernoulli", nothing, {"fate": "size"}, ["has 24 levels", "choose another family"]),
    ("infinite two-level fate", obs("on", np.inf, [0]), {"fate": "on"}, ["infinite in 1 of 24 cells: 'c0'"]),
    # counts
    ("negative counts", obs("count", -1, [3]), POISSON,
     ["fate obs['count'] is negative in 1 of 24 cells: 'c3: -1'", "raw counts"]),
    ("fractional counts", obs("count", 0.5, [3, 4]), POISSON,
     ["not a whole number in 2 of 24 cells: 'c3: 0.5', 'c4: 0.5'"]),
    ("NaN counts", obs("count", np.nan, [7]), POISSON, ["fate obs['count'] is NaN in 1 of 24 cells: 'c7'"]),
    ("no counts at all", obs("count", 0), POISSON, ["one level: it is 0 in all 24 cells"]),
    ("one count", obs("count", [5] + [0] * (N - 1)), POISSON, ["above zero in only 1 of 24 cells: 'c0'"]),
    ("words as counts", nothing, POISSON | {"fate": "stage"},
     ["holds no numbers but text", "counts as numbers", "one level at a time"]),
    ("fractions as negative binomial", nothing, {"fate": "size", "family": "negative_binomial"},
     ["not a whole number in 24 of 24"]),
    # gaussian
    ("text as gaussian", nothing, GAUSSIAN | {"fate": "half"},
     ["no numbers but text", "two levels ('left', 'right')", "'bernoulli'"]),
    ("infinite value", obs("size", -np.inf, [9]), GAUSSIAN, ["fate obs['size'] is infinite in 1 of 24 cells: 'c9'"]),
    ("constant", obs("size", 2.5), GAUSSIAN, ["one level: it is 2.5 in all 24 cells"]),
    ("trials without binomial", nothing, GAUSSIAN | {"trials": "sites"}, ["only family='binomial' has trials"]),
    # binomial
    ("no trials", nothing, BINOMIAL | {"trials": None}, ["family='binomial' needs `trials`"]),
    ("fractional trials", nothing, BINOMIAL | {"trials": np.full(N, 10.5)},
     ["trials is not a whole number in 24 of 24 cells"]),
    ("NaN trials", obs("sites", np.nan, [0]), BINOMIAL, ["trials obs['sites'] is NaN in 1 of 24 cells: 'c0'"]),
    ("more successes than trials", chain(obs("sites", 2, [0, 1]), obs("edited", 3, [0, 1])), BINOMIAL,
     ["trials obs['sites'] is fewer than the successes in 2 of 24 cells: 'c0: 3 of 2', 'c1: 3 of 2'"]),
    ("no trial", chain(obs("sites", 0, [5]), obs("edited", 0, [5])), BINOMIAL,
     ["below 1 in 1 of 24 cells: 'c5: 0 of 0'"]),
    ("trials too short", nothing, BINOMIAL | {"trials": np.full(7, 10)}, ["trials has 7 rows for 24 cells"]),
    ("trials as text", nothing, BINOMIAL | {"trials": "stage"}, ["trials obs['stage'] holds no numbers but text"]),
    ("proportions", obs("edited", 0.3), BINOMIAL,
     ["not a whole number", "a proportion has to be multiplied by its trials"]),
    ("always successful", obs("edited", 10), BINOMIAL, ["one level: it is 1 of the trials in all 24 cells"]),
    # offsets
    ("NaN offset", obs("log_size", np.nan, [1]), POISSON | {"offset": "log_size"},
     ["offset obs['log_size'] is NaN in 1 of 24 cells: 'c1'"]),
    ("infinite offset", obs("log_size", -np.inf, [1]), POISSON | {"offset": "log_size"},
     ["is infinite in 1 of 24 cells", "empty cell"]),
    ("offset too long", nothing, {"offset": np.zeros(N + 1)}, ["offset has 25 rows for 24 cells"]),
    ("offset a number", nothing, {"offset": 1.0}, ["offset has a single value for 24 cells"]),
    ("offset a matrix", nothing, {"offset": np.zeros((N, 2))}, ["offset has shape (24, 2)"]),
    ("offset as text", nothing, {"offset": "stage"}, ["offset obs['stage'] holds no numbers", "link scale"]),
    ("offset not logged", nothing, POISSON | {"offset": np.full(N, 5000.0)}, ["offset goes up to 5000", "logarithm"]),
    # fixed effects
    ("formula names nothing", nothing, {"formula": "~ 1 + stge"},
     ["names 'stge', which is no obs column; similar: 'stage'"]),
    ("formula unreadable", nothing, {"formula": "~ 1 + (time"}, ["formula '~ 1 + (time' cannot be read", "backticks"]),
    ("formula unknown function", nothing, {"formula": "~ 1 + cube(time)"}, ["cannot be evaluated", "cube"]),
    ("formula of everything", nothing, {"formula": "~ ."}, ["formula '~ .' cannot be read", "`.` operator"]),
    ("formula with a module", nothing, {"formula": "~ 1 + scipy.log(time)"}, ["names 'scipy', which is no obs column"]),
    ("formula no text", nothing, {"formula": None}, ["formula is None, wanted text such as '~ 1'"]),
    ("formula with a left side", nothing, {"formula": "fate ~ time"}, ["has a left side", "Write '~ time'"]),
    ("formula with random intercepts", nothing, {"formula": "~ 1 | batch"}, ["several parts", "`groups`"]),
    ("fate explains itself", nothing, {"formula": "~ 1 + on", "fate": "on"},
     ["the fate 'on' among its own covariates"]),
    ("collinear numbers", derived("hours", lambda obs: 24 * obs["time"] + 3), {"formula": "~ 1 + time + size + hours"},
     ["3 of 4 columns are collinear", "'Intercept', 'time', 'hours'", "leave one out"]),
    ("collinear factors", derived("age", lambda obs: obs["stage"].str.upper()), {"formula": "~ 1 + stage + age + time"},
     ["4 of 6 columns are collinear", "'stage[T.late]', 'stage[T.mid]', 'age[T.LATE]', 'age[T.MID]'"]),
    ("empty combination", nothing, {"formula": "~ 1 + half:C(batch * (half == 'left'))"}, ["zero in all 24 cells"]),
    ("constant covariate", obs("time", 2.0), {"formula": "~ 1 + time"},
     ["2 of 2 columns are collinear", "'Intercept', 'time'"]),
    ("covariate with one level", obs("stage", "early"), {"formula": "~ 1 + stage"},
     ["covariate obs['stage'] has one level", "'early'"]),
    ("NaN covariate", obs("stage", None, [0]), {"formula": "~ 1 + stage"},
     ["covariate obs['stage'] is NaN in 1 of 24 cells: 'c0'"]),
    ("infinite covariate", obs("time", np.inf, [0]), {"formula": "~ 1 + time"},
     ["covariate obs['time'] is infinite in 1 of 24 cells"]),
    ("logarithm of zero", obs("time", 0.0, [0, 1]), {"formula": "~ 1 + np.log(np.abs(time))"},
     ["infinite in 2 of 24 cells: 'c0', 'c1'"]),
    ("a level per cell", obs("stage", [f"s{i}" for i in range(N)]), {"formula": "~ 1 + stage"},
     ["24 levels in 24 cells", "groups='stage'"]),
    ("more columns than cells", only(6), {"formula": "~ 1 + stage * time + size", "lineage": None},
     ["columns for 6 cells"]),
    # groups
    ("group unknown", obs("batch", np.nan, [0, 1]), {"groups": "batch"},
     ["group obs['batch'] is NaN in 2 of 24 cells: 'c0', 'c1'"]),
    ("group of one level", obs("batch", 1), {"groups": "batch"},
     ["group obs['batch'] has one level: all 24 cells are '1'"]),
    ("group per yes or no", obs("batch", list(range(N))), {"groups": "batch"},
     ["as many levels as cells (24)", "one yes or no per cell"]),
    ("group per single trial", obs("batch", list(range(N))), BINOMIAL | {"fate": "on", "trials": 1, "groups": "batch"},
     ["one yes or no"]),
    ("group per measurement", obs("batch", list(range(N))), GAUSSIAN | {"groups": "batch"},
     ["what the residual of a gaussian fate already is"]),
    ("group of measurements", nothing, {"groups": "size"}, ["holds fractions", "formula: '~ 1 + size'"]),
    ("group is the fate", nothing, {"groups": "fate"}, ["is the fate itself"]),
    ("group twice", nothing, {"groups": ["batch", "batch"]}, ["given twice"]),
    ("same groups", derived("plate", lambda obs: 10 - obs["batch"]), {"groups": ["batch", "plate"]},
     ["group obs['plate'] and obs['batch'] split the cells in the same way"]),
    ("group called lineage", obs("lineage", [1, 2] * (N // 2)), {"groups": "lineage"},
     ["has the name of another component"]),
    ("groups is a number", nothing, {"groups": 3}, ["groups is of type int, wanted the name", "dict of formulas"]),
    ("group called niche", obs("niche", [1, 2] * (N // 2)), {"groups": "niche"},
     ["has the name of another component"]),
    # slopes
    ("slopes of no column", nothing, {"groups": {"batch": "~ 1 + tme"}},
     ["groups['batch'] = '~ 1 + tme' names 'tme', which is no obs column; similar: 'time'"]),
    ("slopes in no group", nothing, {"groups": {"btch": "~ 1 + time"}}, ["no obs column 'btch'; similar: 'batch'"]),
    ("NaN slope covariate", obs("time", np.nan, [0, 2]), {"groups": {"batch": "~ 1 + time"}},
     ["covariate obs['time'] is NaN in 2 of 24 cells: 'c0', 'c2'"]),
    ("infinite slope covariate", obs("time", 0.0, [0]), {"groups": {"batch": "~ 1 + np.log(np.abs(time))"}},
     ["groups['batch'] = ", "is infinite in 1 of 24 cells: 'c0'"]),
    ("constant slope covariate", obs("time", 2.0), {"groups": {"batch": "~ 1 + time"}},
     ["groups['batch'] = '~ 1 + time': column 'time' is 2 in all 24 cells", "varies"]),
    ("slopes called as a group", derived("batch:time", lambda obs: obs["batch"] % 2),
     {"groups": {"batch": "~ 1 + time", "batch:time": "~ 1"}}, ["two components would be called 'batch:time'", "Rename"]),
    ("a group called as slopes", derived("batch:time", lambda obs: obs["batch"] % 2),
     {"groups": {"batch:time": "~ 1", "batch": "~ 0 + time"}}, ["two components would be called 'batch:time'"]),
    ("same slopes", derived("hours", lambda obs: 24 * obs["time"] + 3), {"groups": {"batch": "~ 1 + time + hours"}},
     ["slopes 'batch:hours' and slopes 'batch:time' follow one covariate, up to its unit", "leave one out"]),
    ("slopes of nothing", nothing, {"groups": {"batch": "~ 0"}}, ["groups['batch'] = '~ 0' has no term"]),
    ("correlated slopes", nothing, {"groups": {"batch": "~ 1 + time | batch"}},
     ["has a '|'", "independent", "'~ 1 + time'"]),
    ("slopes without a formula", nothing, {"groups": {"batch": 3}}, ["groups['batch'] is 3, wanted text"]),
    ("slopes of the fate", nothing, {"fate": "on", "groups": {"batch": "~ 1 + on"}}, ["has the fate 'on'"]),
    ("slopes of a reserved name", obs("spatial", [1, 2] * (N // 2)), {"groups": {"spatial": "~ 0 + time"}},
     ["has the name of another component"]),
    # neighbor graphs
    ("no graph", nothing, GRAPH,
     ["no neighbor graph obsp['spatial_connectivities']; it is empty", "squidpy.gr.spatial_neighbors", "'matern32'"]),
    ("no such graph", ring, GRAPH | {"spatial": "spatial_conectivities"}, ["similar: 'spatial_connectivities'"]),
    ("graph of distances", lambda a: ring(a, "spatial_distances"), GRAPH | {"spatial": "spatial_distances"},
     ["neighbor graph obsp['spatial_distances'] holds distances", "connectivities"]),
    ("graph of others", nothing, GRAPH | {"spatial": sparse.eye_array(5)},
     ["neighbor graph is of shape (5, 5), wanted (24, 24)"]),
    ("graph a number", nothing, GRAPH | {"spatial": 3}, ["of type int, wanted (24, 24)"]),
    ("negative weights", some_weight(-1), GRAPH, ["obsp['spatial_connectivities'] is negative in 3 of 48 entries"]),
    ("NaN weights", some_weight(np.nan), GRAPH, ["is NaN or infinite in 3 of 48 entries"]),
    ("nobody has a neighbor", nothing, GRAPH | {"graph": sparse.eye_array(N)},
     ["neighbor graph has no edge between two of its 24 cells"]),
    ("neighbors in two specimens", ring, GRAPH | {"library_key": "half"},
     ["has 2 edges between cells of different specimens of obs['half']: 'c0 and c23', 'c11 and c12'",
      "library_key='half'"]),
    ("graph for nothing", ring, {"graph": "spatial_connectivities"}, ["graph was given, but nothing goes by it"]),
    # the niche
    ("no niche", nothing, {"niche": "typs"}, ["niche: there is no obsm['typs']", "pd.get_dummies"]),
    ("niche a vector", nothing, {"niche": np.arange(N)}, ["niche has shape (24,)"]),
    ("niche of text", obsm("types", [["a"]] * N), {"niche": "types"},
     ["niche obsm['types'] holds no numbers but text", "0 and 1"]),
    ("NaN niche", obsm("types", np.where(np.arange(N)[:, None] == 3, np.nan, TYPES)), {"niche": "types"},
     ["niche obsm['types'] is NaN in 1 of 24 cells: 'c3'"]),
    ("NaN in a sparse niche", nothing, {"niche": sparse.csr_array(np.where(np.eye(N, 2) > 0, np.nan, 0))},
     ["niche is NaN or infinite in 2 of 24 cells: 'c0', 'c1'"]),
    ("niche the same everywhere", obsm("types", np.ones((N, 2))), {"niche": "types"},
     ["none of its 2 columns differs between the neighborhoods of 24 cells"]),
    ("niche of nobody", lambda a: (obsm("types", TYPES)(a), a.obsm.pop("spatial")), {"niche": "types", "spatial": None},
     ["neither a neighbor graph obsp['spatial_connectivities'] nor coordinates"]),
    ("niche by no graph", obsm("types", TYPES), {"niche": "types", "graph": "delaunay"},
     ["graph: there is no neighbor graph obsp['delaunay']"]),
]
# fmt: on


def graph(edges, **attributes):
    return nx.DiGraph([(above, below, attributes) for above, below in edges])


STAR = [("root", f"c{i}") for i in range(N)]

# fmt: off
SET_TREE = [
    ("cycle", nothing, graph([*STAR, ("c0", "d"), ("d", "c0")][1:]), {}, ["cycle", "'d'"]),
    ("two parents", nothing, graph([*STAR, ("root", "other"), ("other", "c1")]), {},
     ["1 nodes with more than one parent: 'c1'"]),
    ("leaf twice", nothing, one_tree().replace("c3:", "c2:"), {}, ["1 leaf names occur more than once", "'c2'"]),
    ("negative length", nothing, graph(STAR, length=-1.0), {}, ["24 of 25 branch lengths are negative"]),
    ("NaN length", nothing, graph(STAR, length=np.nan), {}, ["24 of 25 branch lengths are NaN or infinite", "'c0'"]),
    ("some lengths", nothing, one_tree().replace("c3:1.0", "c3"), {}, ["no length on 1 of", "'c3'"]),
    ("unbalanced", nothing, one_tree().replace(")", "", 1), {}, ["parentheses"]),
    ("empty text", nothing, "", {}, ["The tree is empty"]),
    ("empty dict", nothing, {}, {}, ["a dict without specimens"]),
    ("a file name", nothing, "trees.nwk", {}, ["neither parentheses nor a semicolon", "names no file that is there"]),
    ("a number", nothing, 5, {}, ["cannot be read from int"]),
    ("undirected", nothing, nx.Graph(STAR), {}, ["undirected graph"]),
    ("table without child", nothing, pd.DataFrame({"parent": ["a"], "kid": ["b"]}), {}, ["without column 'child'"]),
    ("cells without leaf", nothing, half_tree(0, N - 2) + ";", {},
     ["2 of 24 cells have no leaf in the tree: 'c22', 'c23'", "missing='drop'"]),
    ("leaves without cell", only(20), one_tree(), {},
     ["4 of 24 leaves are not cells: 'c20', 'c21', 'c22', 'c23'", "missing='drop'"]),
    ("both", nothing, half_tree(2, N + 2) + ";", {},
     ["2 of 24 cells have no leaf", "2 of 24 leaves are not cells: 'c24', 'c25'"]),
    ("other names", nothing, one_tree().replace("c", "cell"), {"missing": "drop"},
     ["24 of 24 cells have no leaf", "named like 'cell0'", "Rename"]),
    ("cells are ancestors", nothing, one_tree().replace("c3:", "(a:1,b:1)c3:"), {}, ["internal nodes ('c3')"]),
    ("unknown policy", nothing, one_tree(), {"missing": "ignore"},
     ["missing is 'ignore'", "'error', 'drop', 'isolate'"]),
    ("key taken", nothing, one_tree(), {"key_added": "colors"},
     ["uns['colors'] is taken by something that is no tree (a list)"]),
    ("note taken", uns("tree_missing", [1]), one_tree(), {}, ["uns['tree_missing'] is taken by something else"]),
    ("key no name", nothing, one_tree(), {"key_added": "my/tree"}, ["without '/'"]),
    ("specimen with a slash", nothing, {"a/left": trees()["left"], "right": trees()["right"]}, {},
     ["1 specimens", "'a/left'"]),
    ("no cells", only(0), one_tree(), {}, ["adata has no cells"]),
    ("names twice", duplicate_names, one_tree(), {}, ["1 names are shared by 2 of 24 cells: 'c0'"]),
]
# fmt: on


def complaint(call):
    with pytest.raises(DataError) as e:
        call()
    return str(e.value)


def check_text(text, pieces):
    missing = [piece for piece in pieces if piece not in text]
    assert not missing, f"{missing} not in: {text}"
    assert text.endswith("."), text
    assert "\n" not in text


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
@pytest.mark.parametrize(("change", "arguments", "pieces"), [row[1:] for row in READ], ids=[row[0] for row in READ])
def test_wrong_data_is_named(door, change, arguments, pieces):
    adata = embryo()
    change(adata)
    call = {"fate": "fate", "family": "bernoulli"} | arguments
    with unchanged(adata):
        check_text(complaint(lambda: door(adata, **call)), pieces)


@pytest.mark.parametrize(
    ("change", "tree", "arguments", "pieces"), [row[1:] for row in SET_TREE], ids=[row[0] for row in SET_TREE]
)
def test_wrong_tree_is_named(change, tree, arguments, pieces):
    adata = embryo(tree=False)
    change(adata)
    with unchanged(adata):
        check_text(complaint(lambda: set_tree(adata, tree, **arguments)), pieces)


@pytest.mark.parametrize("door", [*DOORS, lambda adata, **_: set_tree(adata, one_tree())])
def test_only_anndata_has_cells(door):
    check_text(
        complaint(lambda: door(embryo().obs, fate="fate", family="bernoulli")),
        ["adata is a DataFrame, wanted an AnnData"],
    )


def test_the_good_embryo_is_good():
    """Or every row above could fail for a reason of its own."""
    for arguments in ({"fate": "fate", "family": "bernoulli"}, GAUSSIAN, POISSON, BINOMIAL):
        adata = embryo()
        with unchanged(adata):
            assert (
                read_cells(adata, **arguments, formula="~ 1 + stage + time", groups="batch", library_key="half").n == N
            )
    adata = embryo(tree=False)
    set_tree(adata, one_tree())
    set_tree(adata, graph(STAR))
    assert set(adata.obs["half"]) == set(HALVES)
