"""The commands `demo` and `decompose`."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cellfate as cf
from cellfate import _keys
from cellfate._runtime import logger
from cellfate.cli import jobs
from cellfate.cli.show import columns, draw, print_tables, print_verdict, short
from cellfate.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData

FIGURES = (".png", ".pdf", ".svg", ".eps", ".jpg", ".jpeg", ".tif", ".tiff")
DEMO_TRUTH: dict[str, Any] = {"variance_lineage": 2.0, "variance_spatial": 1.0, "lengthscale": 0.5}


def demo(*, n: int, seed: int, figure: Path | None) -> None:
    """Simulate, fit, compare."""
    check_figure(figure)
    adata = cf.datasets.simulate(n, family="bernoulli", **DEMO_TRUTH, rng=seed)
    cf.pp.set_tree(adata, adata.uns[_keys.TREE])
    start = time.perf_counter()
    cf.tl.decompose(adata, "fate", family="bernoulli", rng=seed)
    seconds = time.perf_counter() - start
    truth = adata.uns["truth"]
    table = cf.get.components(adata).set_index("component")
    total = truth["variance_lineage"] + truth["variance_spatial"]
    rows = [("quantity", "truth", "estimate", "95% interval")]
    for what, of in (("variance", 1.0), ("share", total)):
        for component in ("lineage", "spatial"):
            row = table.loc[component]
            interval = f"[{short(row[f'{what}_lower'])}, {short(row[f'{what}_upper'])}]"
            true = truth[f"variance_{component}"] / of
            rows.append((f"{what} {component}", short(true), short(row[what]), interval))
    scale = cf.get.draws(adata)["lengthscale_spatial"]
    low, high = scale.quantile([0.025, 0.975])
    rows.append(("length-scale", short(truth["lengthscale"]), short(scale.mean()), f"[{short(low)}, {short(high)}]"))
    print(f"{n} simulated cells, one binary fate, a tree and positions inherited by half; fitted in {seconds:.1f} s\n")
    print(columns(rows))
    print_verdict(cf.get.diagnostics(adata)["verdict"])
    draw(adata, figure, _keys.KEY)


def decompose(
    *,
    input: Path,  # noqa: A002
    out: Path | None,
    overwrite: bool,
    figure: Path | None,
    missing: str,
    scheduler: str | None = None,
    workers: int | None = None,
    gpus_per_worker: int = 0,
    config: Path | None = None,
    store: Path | None = None,
    **options: Any,
) -> None:
    """Read, fit, write, print."""
    from cellfate.io.files import check_suffix, read, write

    if out is None and store is None:
        raise DataError("give --out FILE for the data with the results in them, --store DIR for a job, or both.")
    if out is not None:
        check_suffix(out)
        check_folder(out)
        check_out(out, input, overwrite)
    check_figure(figure)
    options["missing"] = missing
    told = dict(options)
    adata = read(input)
    if out is not None and out.suffix != input.suffix:
        raise DataError(f"{out} and {input} differ in format: keep {input.suffix}, so that nothing is lost.")
    fate, options = arguments(adata, input, options)
    with ExitStack() as stack:
        if store is not None:
            options["store"] = store
            stack.enter_context(jobs.noted(store, input, out, told))
        if scheduler is not None or workers is not None:
            options["client"] = stack.enter_context(
                jobs.connected(scheduler or "local", workers, gpus_per_worker, config)
            )
        cf.tl.decompose(adata, fate, **options)
    key = options.get("key_added", _keys.KEY)
    if out is not None:
        write(adata, out)
    print_tables(adata, key)
    draw(adata, figure, key)
    if out is not None:
        logger.info("results are in %s, uns[%r]", out, key)
    else:
        logger.info("all chunks are in %s; `cellfate merge %s` writes the data with the results in them", store, store)


def arguments(adata: AnnData, source: Path, options: dict[str, Any]) -> tuple[str | list[str] | None, dict[str, Any]]:
    """The fate, and the other arguments of :func:`cellfate.tl.decompose`; a tree from a file is stored in `adata`."""
    options = dict(options)
    missing = options.pop("missing")
    if "priors" in options:
        options["priors"] = dict(_prior(text) for text in options["priors"])
    if options.get("trials", "").isdigit():
        options["trials"] = int(options["trials"])
    if options.get("spatial") == "none":
        options["spatial"] = None
    if "groups" in options:
        options["groups"] = _groups(options["groups"])
    if "tree_weights" in options:
        options["tree_weights"] = _tree_weights(options["tree_weights"])
    if "lineage" in options:
        options["lineage"] = _lineage(adata, options["lineage"], missing)
    elif not any(_keys.TREE in slot for slot in (adata.uns, getattr(adata, "obst", {}), adata.obs)):
        raise DataError(
            f"{source} holds no tree {_keys.TREE!r}: give --tree FILE_OR_KEY, or --tree none to leave ancestry out."
        )
    fate = options.pop("fate", None)
    return (fate[0] if fate is not None and len(fate) == 1 else fate), options


def _tree_weights(words: list[str]) -> str | list[float]:
    """Read ``evidence``, ``equal``, or numbers."""
    try:
        return [float(word) for word in words]
    except ValueError:
        if len(words) == 1:
            return words[0]
        raise DataError(f"--tree-weights {' '.join(words)}: give evidence, equal, or a number for each tree.") from None


def _lineage(adata: AnnData, words: list[str], missing: str) -> str | list[str] | None:
    """Turn what `--tree` names into a key, or a list of keys where it names several trees."""
    if words == ["none"]:
        return None
    if "none" in words:
        raise DataError(f"--tree {' '.join(words)}: 'none' leaves ancestry out, and stands alone.")
    keys = [_tree(adata, text, missing, alone=len(words) == 1) for text in words]
    return keys[0] if len(keys) == 1 else keys


def _tree(adata: AnnData, text: str, missing: str, *, alone: bool) -> str:
    """The key of a tree: a file is stored under the usual one, or by its name beside other trees."""
    slots: dict[str, Any] = {"obst": getattr(adata, "obst", {}), "uns": adata.uns, "obs": adata.obs}
    if any(text in slot for slot in slots.values()):
        return text
    path = Path(text)
    if not path.is_file():
        found = ", ".join(f"{name} {sorted(slot)}" for name, slot in slots.items() if len(slot))
        raise DataError(f"--tree {text}: there is no such file and no such key; the data have {found or 'no keys'}.")
    taken = [slot for slot in ("obst", "uns") if _keys.TREE in slots[slot]]
    key = f"{_keys.TREE}_{path.stem}" if taken or not alone else _keys.TREE
    if key != _keys.TREE and any(key in slots[slot] for slot in ("obst", "uns")):
        raise DataError(f"--tree {text}: the data have a tree called {key!r}; give --tree {key} to use it.")
    cf.pp.set_tree(adata, path, key_added=key, missing=missing)
    if taken and alone:
        logger.info("%s[%r] is left as it is: the tree of %s is %r", taken[0], _keys.TREE, path, key)
    return key


def _groups(words: list[str]) -> list[str] | dict[str, str]:
    """Read ``batch embryo='~ 1 + time'`` as the API takes it: a list of names, or a dict where there are formulas."""
    if words == ["none"]:
        return []
    parts = [word.partition("=") for word in words]
    if not any(formula.lstrip().startswith(("~", "(")) for _, _, formula in parts):
        return words
    names = [name for name, _, _ in parts]
    if len(set(names)) < len(names):
        raise DataError(f"--groups {' '.join(words)}: a column is given twice. Put all of its slopes into one formula.")
    return {name: formula or "~ 1" for name, _, formula in parts}


def _prior(text: str) -> tuple[str, Any]:
    """Read ``sd_lineage=half_normal:2`` as the API takes it: a name or a tuple of a name and numbers."""
    name, _, spec = text.partition("=")
    kind, *numbers = spec.split(":")
    try:
        values = [float(number) for number in numbers]
    except ValueError as e:
        raise DataError(f"--priors {text}: {numbers} are not all numbers; write {name}=half_normal:2.") from e
    if not (name and kind):
        raise DataError(f"--priors {text}: write NAME=PRIOR, such as sd_lineage=half_normal:2 or beta=flat.")
    return name, (kind, *values) if values else kind


def check_out(out: Path, source: Path, overwrite: bool) -> None:
    """Nothing is replaced that was not meant."""
    same = out.exists() and source.exists() and out.samefile(source)
    if same and str(out) != str(source):
        raise DataError(
            f"{out} is the input {source} under another name: give the same name twice, with --overwrite, to overwrite it."
        )
    if out.exists() and not overwrite:
        what = "is the input" if same else "is there already"
        raise DataError(f"{out} {what}: name another file, or give --overwrite to replace it.")


def check_folder(path: Path) -> None:
    """An hour of fitting must not end at a missing folder."""
    if not path.parent.is_dir():
        raise DataError(f"There is no folder {path.parent} for {path.name}: make it first.")


def check_figure(path: Path | None) -> None:
    """Can a figure be written there?"""
    if path is None:
        return
    check_folder(path)
    if path.suffix not in FIGURES:
        raise DataError(f"{path} ends in {path.suffix or 'nothing'!r}: a figure is one of {', '.join(FIGURES)}.")
