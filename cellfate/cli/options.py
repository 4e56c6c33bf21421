"""The options of the commands. Defaults live in the API: an option that is not given is not passed on."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cellfate._runtime import LEVELS
from cellfate.errors import DataError

ABSENT = argparse.SUPPRESS
TABLES = ("slurm", "local")  # of a configuration: how workers are started


class Parser(argparse.ArgumentParser):
    """Says in one line, too, what is wrong with the options."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    """A command, and what all have."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    command.set_defaults(command=run)
    command.add_argument("--verbosity", choices=list(LEVELS), default="info", help="how much to say on stderr")
    return command


def add_demo(commands: Any, demo: Callable[..., Any]) -> None:
    """Options of `cellfate demo`."""
    command = add_command(commands, "demo", demo, "Simulate an embryo, fit it and print the estimate beside the truth.")
    command.add_argument("--n", type=int, default=300, help="cells (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="seed of simulation and fit (default: %(default)s)")
    command.add_argument("--figure", type=Path, help="file for a figure of the partition")


def add_decompose(commands: Any, decompose: Callable[..., Any]) -> None:
    """Options of `cellfate decompose`."""
    summary = "Partition the variation of fates into ancestry and neighborhood; see cellfate.tl.decompose."
    command = add_command(commands, "decompose", decompose, summary)
    command.add_argument("input", type=Path, metavar="IN", help=".h5ad or .h5td file; it is not changed")
    command.add_argument("--out", type=Path, help="file for the data with the results in them")
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
        "--genes",
        dest="fate",
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
    where = command.add_argument_group("where it runs")
    where.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        default=ABSENT,
        help="folder for chunks of many fates as they are finished; the same command goes on from there",
    )
    where.add_argument(
        "--scheduler",
        metavar="local|slurm|ADDRESS",
        help="workers through Dask: processes here, jobs of Slurm, or a Dask scheduler that runs; by default this process alone",
    )
    where.add_argument("--workers", type=int, metavar="N", help="how many; with local by default one for each core")
    where.add_argument(
        "--gpus-per-worker",
        type=int,
        metavar="G",
        default=0,
        help="0 (default), or 1 for a GPU each (dask-cuda, or --gres)",
    )
    where.add_argument(
        "--config",
        type=Path,
        metavar="JOB.toml",
        help="options by their long names, and tables [slurm] and [local] of how workers are started; the command line goes before",
    )
    command.add_argument(
        "--rng", type=int, metavar="SEED", default=0, help="seed of the posterior draws (default: %(default)s)"
    )


def _count(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def configured(argv: Sequence[str]) -> list[str]:
    """The command line with the options of `--config` in front of its own, which count where both are given."""
    words = list(argv)
    path = _config_of(words)
    if path is None:
        return words
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    given |= {"--fate"} if "--genes" in given else set()
    more: list[str] = []
    for name, value in read_config(path).items():
        if name in TABLES:
            continue
        option = f"--{name.replace('_', '-')}"
        option = "--fate" if option == "--genes" else option
        if option in given or f"--no-{option[2:]}" in given or option.replace("--no-", "--") in given:
            continue
        if isinstance(value, bool):
            more += [option] if value else [f"--no-{option[2:]}"] if option == "--reml" else []
        elif isinstance(value, list):
            more += [option, *map(str, value)]
        elif isinstance(value, dict):
            raise DataError(f"{path} has a table [{name}]; there are {' and '.join(f'[{t}]' for t in TABLES)}.")
        else:
            more += [f"{option}={value}"]
    return [*words, *more]


def read_config(path: Path) -> dict[str, Any]:
    """A file of options."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as e:
        raise DataError(f"--config {path} cannot be read: {e.strerror or e}.") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise DataError(f"--config {path} is no TOML: {e}.") from e


def _config_of(words: Sequence[str]) -> Path | None:
    for i, word in enumerate(words):
        if word.startswith("--config="):
            return Path(word.partition("=")[2])
        if word == "--config" and i + 1 < len(words):
            return Path(words[i + 1])
    return None
