"""`cellfate` on the command line: each option is an argument of the API function, nothing more.

Tables go to stdout, progress, warnings and errors to stderr. What is wrong with the input is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import cellfate as cf
from cellfate import _keys
from cellfate._runtime import LEVELS, logger
from cellfate.errors import CellfateWarning, DataError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

FIGURES = (".png", ".pdf", ".svg", ".eps", ".jpg", ".jpeg", ".tif", ".tiff")
DEMO_TRUTH: dict[str, Any] = {"variance_lineage": 2.0, "variance_spatial": 1.0, "lengthscale": 0.5}
ABSENT = argparse.SUPPRESS  # an option that is not given is not passed on: the defaults live in the API
FIRST_ASK = "First ask whether there is anything to divide at all"
MOST_ROWS = 40  # of a table of many responses on the screen


class Parser(argparse.ArgumentParser):
    """Says in one line, too, what is wrong with the options."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    arguments = vars(parser().parse_args(argv))
    command, level = arguments.pop("command"), arguments.pop("verbosity")
    before = logger.level
    cf.verbosity(level)
    try:
        with warnings.catch_warnings():
            # Warnings of other packages are for programmers; ours are for the user.
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", CellfateWarning)
            warnings.showwarning = _show_warning
            command(**arguments)
    except (ValueError, OSError, NotImplementedError, MemoryError, RuntimeError) as e:  # DataError is a ValueError
        text = _explained(e)
        if text is None:
            raise
        print(f"cellfate: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cellfate: interrupted", file=sys.stderr)
        return 130
    finally:
        logger.setLevel(before)
    return 0


def parser() -> Parser:
    """Return the parser of all commands."""
    top = Parser(prog="cellfate", description=cf.__doc__, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"cellfate {cf.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_decompose(commands)
    return top


def _add_command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    command.set_defaults(command=run)
    command.add_argument("--verbosity", choices=list(LEVELS), default="info", help="how much to say on stderr")
    return command


def _add_demo(commands: Any) -> None:
    command = _add_command(
        commands, "demo", demo, "Simulate an embryo, fit it and print the estimate beside the truth."
    )
    command.add_argument("--n", type=int, default=300, help="cells (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="seed of simulation and fit (default: %(default)s)")
    command.add_argument("--figure", type=Path, help="file for a figure of the partition")


def _add_decompose(commands: Any) -> None:
    summary = "Partition the variation of fates into ancestry and neighborhood; see cellfate.tl.decompose."
    command = _add_command(commands, "decompose", decompose, summary)
    command.add_argument("input", type=Path, metavar="IN", help=".h5ad or .h5td file; it is not changed")
    command.add_argument("--out", type=Path, required=True, help="file for the data with the results in them")
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it is there; it may then be IN")
    command.add_argument("--figure", type=Path, help="file for a figure of the partition")
    command.add_argument(
        "--tree",
        dest="lineage",
        nargs="+",
        metavar="FILE_OR_KEY",
        default=ABSENT,
        help="Newick file, or key of .obst or .uns (for --lineage-kernel clone also a column of .obs), or 'none'; several are "
        "as many trees of the same cells, fitted under each and pooled",
    )
    command.add_argument(
        "--tree-weights",
        nargs="+",
        metavar="WEIGHT",
        default=ABSENT,
        help="of several trees: evidence, equal, or a number for each",
    )
    command.add_argument(
        "--missing", default="error", help="for a Newick file: error, drop or isolate; see cellfate.pp.set_tree"
    )
    command.add_argument(
        "--fate",
        nargs="+",
        metavar="NAME",
        default=ABSENT,
        help="columns of .obs, or genes, each a response of its own; by default all genes that --min-cells lets pass",
    )
    command.add_argument(
        "--family",
        required=True,
        help="gaussian, bernoulli, binomial, poisson, negative_binomial, ordinal, beta or categorical",
    )
    texts = {
        "layer": "layer of the genes, in place of .X",
        "link": "link function of the family",
        "formula": "fixed effects, such as '~ 1 + stage'",
        "lineage-kernel": "brownian, ou, pagel, early_burst or clone",
        "spatial": "key of .obsm with the coordinates, for a graph of .obsp, or 'none'",
        "spatial-kernel": "matern12, matern32, matern52, rbf or graph",
        "graph": "key of .obsp with the neighbor graph, for --spatial-kernel graph and --niche",
        "niche": "key of .obsm with features to average over neighbors",
        "library-key": "column of .obs that tells specimens apart",
        "offset": "column of .obs with a known offset on link scale",
        "trials": "for binomial: column of .obs, or a number",
        "method": "variational, laplace or ep",
        "engine": "how the Gaussian problems are solved",
        "device": "auto, cpu, cuda or cuda:<number>",
        "dtype": "float64 or float32",
        "key-added": "name of the results in the file",
    }
    for name, text in texts.items():
        command.add_argument(f"--{name}", default=ABSENT, help=text)
    command.add_argument(
        "--lengthscale", type=float, default=ABSENT, help="hold the spatial length-scale at this value"
    )
    command.add_argument(
        "--min-cells", type=int, default=ABSENT, help="cells in which a gene has to be other than zero"
    )
    command.add_argument(
        "--chunk-size", type=_count, metavar="N", default=ABSENT, help="fates that are read at once, or 'auto'"
    )
    command.add_argument("--rank", type=int, default=ABSENT, help="columns for a spatial field, or modes on a graph")
    command.add_argument(
        "--groups",
        nargs="+",
        metavar="COLUMN[=FORMULA]",
        default=ABSENT,
        help="columns of .obs, random intercepts, with slopes as in 'embryo=~ 1 + time'; or 'none', also for the one of "
        "specimens",
    )
    command.add_argument(
        "--interaction", action="store_true", default=ABSENT, help="also the interaction of ancestry and neighborhood"
    )
    command.add_argument(
        "--per-fate",
        action="store_true",
        default=ABSENT,
        help="a variance of each component for every fate (categorical)",
    )
    command.add_argument(
        "--olre", action="store_true", default=ABSENT, help="an effect of its own for every cell: overdispersed counts"
    )
    command.add_argument(
        "--priors",
        nargs="+",
        metavar="NAME=PRIOR",
        default=ABSENT,
        help="such as sd_lineage=half_normal:2 beta=normal:5 sd_batch=flat",
    )
    command.add_argument(
        "--reml",
        action=argparse.BooleanOptionalAction,
        default=ABSENT,
        help="integrate the fixed effects out (default), or maximize over them",
    )
    command.add_argument(
        "--rng", type=int, metavar="SEED", default=0, help="seed of the posterior draws (default: %(default)s)"
    )


def demo(*, n: int, seed: int, figure: Path | None) -> None:
    """Simulate, fit, compare."""
    _check_figure(figure)
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
            interval = f"[{_short(row[f'{what}_lower'])}, {_short(row[f'{what}_upper'])}]"
            true = truth[f"variance_{component}"] / of
            rows.append((f"{what} {component}", _short(true), _short(row[what]), interval))
    scale = cf.get.draws(adata)["lengthscale_spatial"]
    low, high = scale.quantile([0.025, 0.975])
    rows.append(
        ("length-scale", _short(truth["lengthscale"]), _short(scale.mean()), f"[{_short(low)}, {_short(high)}]")
    )
    print(f"{n} simulated cells, one binary fate, a tree and positions inherited by half; fitted in {seconds:.1f} s\n")
    print(_columns(rows))
    _print_verdict(cf.get.diagnostics(adata)["verdict"])
    _draw(adata, figure, _keys.KEY)


def decompose(
    *,
    input: Path,  # noqa: A002
    out: Path,
    overwrite: bool,
    figure: Path | None,
    missing: str,
    **options: Any,
) -> None:
    """Read, fit, write, print."""
    from cellfate.io.files import check_suffix, read, write

    check_suffix(out)
    _check_folder(out)
    _check_figure(figure)
    _check_out(out, input, overwrite)
    if "priors" in options:
        options["priors"] = dict(_prior(text) for text in options["priors"])
    if options.get("trials", "").isdigit():
        options["trials"] = int(options["trials"])
    if options.get("spatial") == "none":
        options["spatial"] = None
    if "groups" in options:
        options["groups"] = _groups(options["groups"])
    adata = read(input)
    if out.suffix != input.suffix:
        raise DataError(f"{out} and {input} differ in format: keep {input.suffix}, so that nothing is lost.")
    if "tree_weights" in options:
        options["tree_weights"] = _tree_weights(options["tree_weights"])
    if "lineage" in options:
        options["lineage"] = _lineage(adata, options["lineage"], missing)
    elif not any(_keys.TREE in slot for slot in (adata.uns, getattr(adata, "obst", {}), adata.obs)):
        raise DataError(
            f"{input} holds no tree {_keys.TREE!r}: give --tree FILE_OR_KEY, or --tree none to leave ancestry out."
        )
    fate = options.pop("fate", None)
    cf.tl.decompose(adata, fate[0] if fate is not None and len(fate) == 1 else fate, **options)
    key = options.get("key_added", _keys.KEY)
    write(adata, out)
    _print_tables(adata, key)
    _draw(adata, figure, key)
    logger.info("results are in %s, uns[%r]", out, key)


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


def _check_out(out: Path, source: Path, overwrite: bool) -> None:
    """Nothing is replaced that was not meant."""
    same = out.exists() and source.exists() and out.samefile(source)
    if same and str(out) != str(source):
        raise DataError(
            f"{out} is the input {source} under another name: give the same name twice, with --overwrite, to overwrite it."
        )
    if out.exists() and not overwrite:
        what = "is the input" if same else "is there already"
        raise DataError(f"{out} {what}: name another file, or give --overwrite to replace it.")


def _check_folder(path: Path) -> None:
    """An hour of fitting must not end at a missing folder."""
    if not path.parent.is_dir():
        raise DataError(f"There is no folder {path.parent} for {path.name}: make it first.")


def _check_figure(path: Path | None) -> None:
    if path is None:
        return
    _check_folder(path)
    if path.suffix not in FIGURES:
        raise DataError(f"{path} ends in {path.suffix or 'nothing'!r}: a figure is one of {', '.join(FIGURES)}.")


def _draw(adata: AnnData, path: Path | None, key: str) -> None:
    if path is None:
        return
    cf.pl.variance_shares(adata, key, show=False, save=path)
    logger.info("figure is in %s", path)


def _count(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _print_many(adata: AnnData, key: str) -> None:
    """A row per response, the first of many, and what went wrong."""
    table, status = cf.get.components(adata, key), cf.get.responses(adata, key)["status"]
    names = list(dict.fromkeys(table["component"]))
    shares = table.pivot_table(index="response", columns="component", values="share", sort=False)[names]
    rows = [("share of", *names)]
    rows += [
        (str(name), *(f"{share:.2f}" for share in row))
        for name, row in zip(shares.index, shares.to_numpy(), strict=True)
    ]
    print(_columns(rows[: 1 + MOST_ROWS]))
    if len(shares) > MOST_ROWS:
        print(f"and {len(shares) - MOST_ROWS} more")
    failed = int(status.str.startswith("failed").sum())
    print(
        f"\n{len(status)} fates: {failed} failed, {len(status) - failed - int((status == 'converged').sum())} in doubt"
    )
    verdicts = cf.get.responses(adata, key).get("verdict")
    if verdicts is not None and (weak := int(verdicts.astype(str).str.startswith("weak").sum())):
        print(f"{weak} with a weak verdict. {FIRST_ASK} with cf.tl.test_components(adata).")


def _print_tables(adata: AnnData, key: str) -> None:
    if _keys.RESPONSES in adata.uns[key]:
        _print_many(adata, key)
        return
    params, diagnostics = cf.get.params(adata, key), cf.get.diagnostics(adata, key)
    for scale in ("latent", "link", "realized"):
        table = cf.get.components(adata, key, scale=scale)
        response = table["response"].iloc[0]
        print(f"{response}: {params.get('family')}, {params.get('link')} link; {scale} scale")
        print(_columns(_component_rows(table)), end="\n\n")
    fixed = cf.get.fixed_effects(adata, key)
    rows = [("term", "estimate", "sd", "95% interval")]
    rows += [
        (str(r.term), _short(r.estimate), _short(r.sd), f"[{_short(r.lower)}, {_short(r.upper)}]")
        for r in fixed.itertuples()
    ]
    print(_columns(rows))
    shapes = [
        (str(r.term), _short(r.median), f"[{_short(r.lower)}, {_short(r.upper)}]")
        for r in cf.get.hyperparameters(adata, key).itertuples()
    ]
    if shapes:
        print("\n" + _columns([("hyperparameter", "median", "95% interval"), *shapes]))
    _print_verdict(diagnostics.get("verdict"))


def _print_verdict(verdict: str | None) -> None:
    """And where it is weak, what to ask first."""
    if verdict:
        print(f"\n{verdict}")
    if verdict and verdict.startswith("weak"):
        print(f"{FIRST_ASK} with cf.tl.test_components(adata).")


def _component_rows(table: pd.DataFrame) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("component", "variance", "95% interval", "share", "95% interval")]
    for r in table.itertuples():
        rows.append(
            (
                r.component,
                _short(r.variance),
                f"[{_short(r.variance_lower)}, {_short(r.variance_upper)}]",
                f"{r.share:.3f}",
                f"[{r.share_lower:.3f}, {r.share_upper:.3f}]",
            )
        )
    return rows


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(w) if j == 0 else text.rjust(w) for j, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _short(x: float) -> str:
    """Three digits, or all before the point; without a trailing one."""
    if x == 0 or 1e3 <= abs(x) < 1e5:
        return f"{x:.0f}"
    return f"{x:#.3g}".rstrip(".") if 1e-3 <= abs(x) < 1e3 else f"{x:.2e}"


def _explained(error: Exception) -> str | None:
    """In one line what is wrong, or None where it is a bug of ours."""
    text = _one_line(error)
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"out of memory ({text}). Take fewer cells, give --library-key if there are several specimens, or a larger machine."
    if name in ("LinAlgError", "_LinAlgError"):
        return f"a matrix could not be solved ({text}). Try --dtype float64, and look for cells at one position or copies of a cell."
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
        return None
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"cellfate: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
