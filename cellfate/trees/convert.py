"""Trees from and to what people keep them in: networkx graphs, Newick text, edge tables."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cellfate.errors import DataError
from cellfate.trees.forest import Forest, examples

if TYPE_CHECKING:
    import networkx as nx

LENGTHS = ("length", "branch_length", "weight")  # names of an edge attribute or column that holds branch lengths
TIMES = ("time", "depth")  # names of a node attribute whose differences are branch lengths

# A quoted name, a comment, or a structural character with the white space around it.
TOKEN = re.compile(r"\s*'((?:[^']|'')*)'\s*|\[[^\]]*\]|\s*([(),:;])\s*|\s+")
QUOTED = "\ue000"  # stands before the number of a quoted name, which the reader then need not understand
UNSAFE = re.compile(r"[\s()\[\]{}:;,'\"]|^$")


def to_forest(tree: Any, *, branch_length: str | None = None) -> Forest:
    """Read a tree.

    Parameters
    ----------
    tree
        A networkx `DiGraph` (edges point from parent to child), Newick text (several trees one after the other are a
        forest), an edge table (anything with columns `parent`, `child` and perhaps `length` or `branch_length`, or an array
        of two or three columns; a missing parent marks a root), a `Forest`, a list of those, or a dict of them by
        specimen.
    branch_length
        Edge attribute or column that holds branch lengths. By default `length`, `branch_length` or `weight`, else, in a
        graph, differences of the node attribute `time` or `depth`, else every branch has length 1.
    """
    return _read(tree, branch_length, "The tree")


def _read(tree: Any, branch_length: str | None, label: str) -> Forest:
    if isinstance(tree, Forest):
        return tree
    if isinstance(tree, str):
        return _from_newick(tree, branch_length, label)
    if hasattr(tree, "is_directed") and hasattr(tree, "edges"):
        return _from_graph(tree, branch_length, label)
    if hasattr(tree, "columns") or (isinstance(tree, Mapping) and {"parent", "child"} <= set(tree)):
        return _from_table(tree, branch_length, label)
    if isinstance(tree, Mapping):
        if not tree:
            raise DataError(f"{label} is empty: a dict without specimens. Give at least one tree.")
        forests = [_read(one, branch_length, f"The tree of {str(name)!r}") for name, one in tree.items()]
        return Forest.join(forests, [str(name) for name in tree])
    if isinstance(tree, np.ndarray):
        return _from_array(tree, label)
    if isinstance(tree, Sequence):
        return Forest.join([_read(one, branch_length, f"{label} {i}") for i, one in enumerate(tree)])
    raise DataError(
        f"{label} cannot be read from {type(tree).__name__}. Give a networkx.DiGraph, Newick text, an edge "
        "table with columns parent and child, or a dict of those by specimen."
    )


# --- Newick ---------------------------------------------------------------------------------------------------------------


def _from_newick(text: str, branch_length: str | None, label: str) -> Forest:
    if branch_length is not None:
        raise DataError(
            f"{label} is Newick text, which carries its own lengths; branch_length={branch_length!r} names an "
            "edge attribute or column. Leave it out."
        )
    if not text.strip():
        raise DataError(f"{label} is empty: Newick text without a character. Give a tree with at least one leaf.")
    if "(" not in text and ";" not in text:
        raise DataError(
            f"{label} is no Newick text: {_excerpt(text)} has neither parentheses nor a semicolon, and it names no "
            "file that is there. Check the path; a tree of one cell is written 'cell;'."
        )
    quoted: list[str] = []

    def token(match: re.Match[str]) -> str:
        if match[1] is not None:
            quoted.append(match[1].replace("''", "'"))
            return f"{QUOTED}{len(quoted) - 1}"
        return match[2] or (" " if match[0].isspace() else "")

    trees = [one.strip() for one in TOKEN.sub(token, text).split(";")]
    names: list[str] = []
    parent: list[int] = []
    length: list[float | None] = []
    for one in trees:
        if one:
            _grow(one, quoted, label, names, parent, length)
    if not names:
        raise DataError(f"{label} is empty: {_excerpt(text)} holds no node. Give a tree with at least one leaf.")
    return _assemble(names, parent, length, label)


def _grow(
    text: str, quoted: Sequence[str], label: str, names: list[str], parent: list[int], length: list[float | None]
) -> None:
    """Read one tree and append its nodes."""
    from treeswift import read_tree_newick

    opened, closed = text.count("("), text.count(")")
    if opened != closed:
        raise DataError(
            f"{label} is not readable as Newick: {opened} opening and {closed} closing parentheses in "
            f"{_excerpt(text)}. Check that the text is complete."
        )
    try:
        root = read_tree_newick((text + ";").ljust(1000)).root  # a shorter text might be taken for the name of a file
    except RuntimeError as e:
        raise DataError(
            f"{label} is not readable as Newick: {_excerpt(text)}. Check parentheses, commas and that every "
            "length after a colon is a number; names with such characters need quotes."
        ) from e
    stack = [(root, -1)]
    while stack:
        node, above = stack.pop()
        name = (node.label or "").strip()
        if QUOTED in name:
            before, *numbers = name.split(QUOTED)
            if before or len(numbers) > 1 or not numbers[0].isdigit():
                whole = re.sub(f"{QUOTED}([0-9]+)", lambda match: f"'{quoted[int(match[1])]}'", name)
                raise DataError(
                    f"{label} is not readable as Newick: text beside a quoted name in {_excerpt(whole)}. "
                    "Quote a name as a whole, and double a quote inside it."
                )
            name = quoted[int(numbers[0])]
        names.append(name)
        parent.append(above)
        length.append(node.edge_length)
        stack.extend((child, len(names) - 1) for child in reversed(node.children))


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _newick_lines(forest: Forest) -> list[str]:
    first = forest.start.tolist()
    opening = np.bincount(forest.start, minlength=forest.n_nodes) - forest.is_leaf
    lines: list[str] = []
    parts: list[str] = []
    top = np.zeros(forest.n_nodes, dtype=np.int64)  # the highest node that begins at a leaf
    np.maximum.at(top, forest.start, np.arange(forest.n_nodes))
    for node, (above, length, name, leaf) in enumerate(
        zip(forest.parent.tolist(), forest.branch_length.tolist(), forest.names, forest.is_leaf.tolist(), strict=True)
    ):
        if leaf:
            elder = forest.parent[top[node]]
            parts.append("," if elder >= 0 and first[elder] < node else "")
            parts.append("(" * int(opening[node]))
        else:
            parts.append(")")
        if name:
            parts.append("'" + name.replace("'", "''") + "'" if UNSAFE.search(name) else name)
        if above >= 0 or length > 0:
            parts.append(f":{length!r}")
        if above == -1:
            lines.append("".join(parts) + ";")
            parts = []
    return lines


def to_newick(forest: Forest) -> str:
    """Newick text, one tree per line, lengths to the last digit; `to_forest` reads it back as it was."""
    return "\n".join(_newick_lines(forest))


def to_newick_dict(forest: Forest) -> dict[str, str]:
    """Newick text by tree name; trees that share a name stand together, one per line."""
    texts: dict[str, list[str]] = {}
    for name, line in zip(forest.tree_names, _newick_lines(forest), strict=True):
        texts.setdefault(name, []).append(line)
    return {name: "\n".join(lines) for name, lines in texts.items()}


# --- networkx -------------------------------------------------------------------------------------------------------------


def _from_graph(graph: nx.DiGraph[Any], branch_length: str | None, label: str) -> Forest:
    if not graph.is_directed():
        raise DataError(
            f"{label} is an undirected graph of {graph.number_of_nodes()} nodes. Give a networkx.DiGraph whose "
            "edges point from parent to child, e.g. `nx.bfs_tree(graph, root)` with the lengths copied."
        )
    nodes = list(graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    edges = [(index[above], index[below], data) for above, below, data in graph.edges(data=True)]
    names = [str(node) for node in nodes]
    if len(set(names)) < len(names):
        raise DataError(
            f"{label} has {len(names)} nodes but {len(set(names))} different names once written as text. "
            "Rename the nodes."
        )
    parent = _one_parent(
        [names[above] for above, _, _ in edges],
        [above for above, _, _ in edges],
        [below for _, below, _ in edges],
        names,
        label,
    )
    length: list[float | None] = [None] * len(nodes)
    wanted = (branch_length,) if branch_length is not None else LENGTHS
    attribute = next((key for key in wanted if any(key in data for _, _, data in edges)), None)
    if attribute is None and branch_length is not None and edges:
        raise DataError(
            f"{label} has no edge attribute {branch_length!r} on any of its {len(edges)} edges. "
            "Name the attribute that holds branch lengths, or leave branch_length out."
        )
    times = next((key for key in TIMES if any(key in data for _, data in graph.nodes(data=True))), None)
    if attribute is not None:
        for _, below, data in edges:
            length[below] = _number(data.get(attribute), f"edge attribute {attribute!r}", names[below], label)
    elif times is not None and edges:
        at = {
            index[node]: _number(value, f"node attribute {times!r}", str(node), label)
            for node, value in graph.nodes(data=times)
        }
        missing = [names[i] for i, value in at.items() if value is None]
        if missing:
            raise DataError(
                f"{label} has no {times!r} on {len(missing)} of {len(nodes)} nodes: {examples(missing)}. "
                f"Set {times!r} on all nodes, or `length` on all edges."
            )
        for above, below, _ in edges:
            length[below] = (at[below] or 0.0) - (at[above] or 0.0)
    for i, node in enumerate(nodes):  # the length above a root has no edge to stand on
        if parent[i] == -1:
            length[i] = _number(graph.nodes[node].get(attribute or "length"), "root length", names[i], label)
    return _assemble(names, parent, length, label)


def to_graph(forest: Forest) -> nx.DiGraph[str]:
    """A `networkx.DiGraph` with `length` on its edges (and on a root that has a length of its own).

    Nodes go by their names; internal nodes without a name, or with one that is not theirs alone, get a new one.
    """
    import networkx as nx

    names = graph_names(forest)
    graph: nx.DiGraph[str] = nx.DiGraph()
    for node, above in enumerate(forest.parent.tolist()):
        length = float(forest.branch_length[node])
        if above >= 0:
            graph.add_edge(names[above], names[node], length=length)
        elif length > 0:
            graph.add_node(names[node], length=length)
        else:
            graph.add_node(names[node])
    return graph


def graph_names(forest: Forest) -> list[str]:
    """One unique name per node: its own where it has one to itself, else `node<number>`."""
    taken = set(forest.names[forest.leaves])
    unique = []
    for node, name in enumerate(forest.names):
        if not forest.is_leaf[node]:
            if not name or name in taken:
                name = f"node{node}"
                while name in taken:
                    name += "_"
            taken.add(name)
        unique.append(name)
    return unique


# --- edge tables ----------------------------------------------------------------------------------------------------------


def _from_array(table: np.ndarray, label: str) -> Forest:
    if table.ndim != 2 or table.shape[1] not in (2, 3):
        raise DataError(
            f"{label} is an array of shape {table.shape}. An edge table has two columns (parent, child) or three "
            "(parent, child, length)."
        )
    columns = {"parent": table[:, 0], "child": table[:, 1]}
    if table.shape[1] == 3:
        columns["length"] = table[:, 2]
    return _from_table(columns, None, label)


def _from_table(table: Any, branch_length: str | None, label: str) -> Forest:
    columns = [str(column) for column in (table.columns if hasattr(table, "columns") else table)]
    missing = [column for column in ("parent", "child", branch_length) if column is not None and column not in columns]
    if missing:
        raise DataError(
            f"{label} is an edge table without column {examples(missing)}; it has {examples(columns)}. "
            "Name the columns parent, child and length."
        )
    parents, children = (np.asarray(table[column], dtype=object) for column in ("parent", "child"))
    if len(children) == 0:
        raise DataError(f"{label} is empty: an edge table without rows. Give a tree with at least one leaf.")
    nameless = sum(_is_missing(child) for child in children)
    if nameless:
        raise DataError(f"{label} has {nameless} of {len(children)} rows without a child. Give every row one.")
    above = ["" if _is_missing(value) else _name(value) for value in parents]
    below = [_name(value) for value in children]
    names = list(dict.fromkeys(name for pair in zip(above, below, strict=True) for name in pair if name))
    index = {name: i for i, name in enumerate(names)}
    parent = _one_parent(above, [index.get(name, -1) for name in above], [index[name] for name in below], names, label)
    column = branch_length or next((key for key in LENGTHS if key in columns), None)
    length: list[float | None] = [None] * len(names)
    if column is not None:
        for over, name, value in zip(above, below, np.asarray(table[column], dtype=object), strict=True):
            given = None if over == "" and _is_missing(value) else value  # a root need not have a length
            length[index[name]] = _number(given, f"column {column!r}", name, label)
    return _assemble(names, parent, length, label)


def to_edges(forest: Forest) -> dict[str, np.ndarray]:
    """An edge table: columns `parent`, `child`, `branch_length`, ready for `pandas.DataFrame`.

    A root gets a row of its own, with parent "", only where it is a leaf or has a length.
    """
    names = np.array(graph_names(forest), dtype=object)
    rows = ~forest.is_root | forest.is_leaf | (forest.branch_length > 0)
    parent = np.where(forest.is_root, "", names[forest.parent])
    return {"parent": parent[rows], "child": names[rows], "branch_length": forest.branch_length[rows]}


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or bool(value != value)  # NaN is not itself


def _name(value: Any) -> str:
    """Node name of a table's entry: 3 and 3.0 are the same node."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


# --- what all of them share -----------------------------------------------------------------------------------------------


def _number(value: Any, what: str, name: Hashable, label: str) -> float | None:
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as e:
        raise DataError(f"{label} has {what} {value!r} at {name!r}, which is no number. Give numbers.") from e


def _one_parent(
    parent_names: Sequence[str], above: Iterable[int], below: Iterable[int], names: Sequence[str], label: str
) -> list[int]:
    """Parent of every node, which has to be one."""
    parent = [-1] * len(names)
    seen = [False] * len(names)
    twice: dict[str, list[str]] = {}
    for parent_name, i, j in zip(parent_names, above, below, strict=True):
        if seen[j]:
            twice.setdefault(names[j], [names[parent[j]] if parent[j] >= 0 else ""]).append(parent_name)
        seen[j] = True
        parent[j] = i
    if twice:
        child, parents = next(iter(twice.items()))
        raise DataError(
            f"{label} has {len(twice)} nodes with more than one parent: {examples(twice)}; {child!r} has "
            f"{examples(parents)}. Remove the edges that are not descent by division."
        )
    return parent


def _assemble(names: Sequence[str], parent: Sequence[int], length: Sequence[float | None], label: str) -> Forest:
    """A forest from nodes in any order, by post-order; children keep their order."""
    if not names:
        raise DataError(f"{label} is empty: it has no node. Give a tree with at least one leaf.")
    children: list[list[int]] = [[] for _ in names]
    roots: list[int] = []
    for node, above in enumerate(parent):
        (roots if above == -1 else children[above]).append(node)
    order: list[int] = []
    stack = roots.copy()
    while stack:  # parents first, last child first: backwards this is post-order
        order.append(stack.pop())
        stack.extend(children[order[-1]])
    order.reverse()
    if len(order) < len(names):
        cycle = _find_cycle(parent, set(range(len(names))).difference(order))
        raise DataError(
            f"{label} has a cycle of {len(cycle)} nodes: {examples(names[node] for node in cycle)}. "
            "An ancestor cannot be its own descendant: remove one of these edges."
        )
    missing = [node for node in order if length[node] is None and parent[node] != -1]
    branches = len(names) - len(roots)
    if missing and len(missing) < branches:
        raise DataError(
            f"{label} has no length on {len(missing)} of {branches} branches, above "
            f"{examples(names[node] or 'an unnamed node' for node in missing)}. "
            "Give lengths on all branches, or on none for unit lengths."
        )
    default = 1.0 if missing else 0.0
    given = ((length[node], 0.0 if parent[node] == -1 else default) for node in order)
    values = [instead if value is None else value for value, instead in given]
    index = np.empty(len(names) + 1, dtype=np.int64)
    index[order] = np.arange(len(names))
    index[-1] = -1
    try:
        return Forest(
            index[[parent[node] for node in order]],
            np.array(values),
            np.array([names[node] for node in order]),
            tuple(str(i) for i in range(len(roots))),
        )
    except DataError as e:
        raise (e if label == "The tree" else DataError(f"{label}: {e}")) from None


def _find_cycle(parent: Sequence[int], among: Iterable[int]) -> list[int]:
    seen: dict[int, None] = {}
    node = next(iter(among))
    while node not in seen:
        seen[node] = None
        node = parent[node]
    path = list(seen)
    return path[path.index(node) :][::-1]
