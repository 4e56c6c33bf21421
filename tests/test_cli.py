"""The command line gives what the API gives, and says in one line what is wrong."""

import inspect
import re

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import cellfate as cf
from cellfate import cli
from cellfate.cli import fit, show
from cellfate.errors import DataError

N = 40


@pytest.fixture(scope="module")
def simulated():
    return cf.datasets.simulate(N, family="bernoulli", variance_lineage=2.0, coefficients={"x": 0.5}, rng=3)


@pytest.fixture
def folder(tmp_path, simulated):
    """An .h5ad without a tree, and the tree as a file."""
    adata = simulated.copy()
    (tmp_path / "tree.nwk").write_text(adata.uns.pop("tree") + "\n")
    adata.obs["clone"] = [f"clone{i % 4}" for i in range(N)]
    adata.write_h5ad(tmp_path / "in.h5ad")
    (tmp_path / "broken.nwk").write_text("((cell0,cell1),cell2;")
    (tmp_path / "other.nwk").write_text("((a,b),c);")
    (tmp_path / "text.h5ad").write_text("no HDF5 at all")
    return tmp_path


def run(folder, text, capsys):
    """Run a command line in which `{}` is the folder."""
    words = [word.replace("{}", str(folder)) for word in text.split()]
    try:
        code = cli.main(words)
    except SystemExit as e:  # argparse leaves by itself
        code = e.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def decompose_options():
    (commands,) = (a for a in cli.parser()._actions if isinstance(a.choices, dict))
    return {a.dest: a for a in commands.choices["decompose"]._actions if a.dest != "help"}


FILES = {"input", "out", "overwrite", "figure", "missing", "verbosity"}
RUN = {"scheduler", "workers", "gpus_per_worker", "config"}  # of which a client is made


def test_every_option_is_an_argument_and_every_argument_an_option():
    arguments = inspect.signature(cf.tl.decompose).parameters
    assert set(decompose_options()) - FILES - RUN == set(arguments) - {"adata", "copy", "client"}


def test_defaults_live_in_the_api():
    for name, option in decompose_options().items():
        if name not in FILES | RUN | {"rng"}:  # a command line that is typed twice gives the same numbers
            assert option.required or option.default == cli.ABSENT, name


def test_decompose_gives_what_the_api_gives(folder, capsys, simulated):
    before = (folder / "in.h5ad").read_bytes()
    code, out, err = run(
        folder,
        "decompose {}/in.h5ad --fate fate --family bernoulli --formula ~1+x --tree {}/tree.nwk --lengthscale 0.5 "
        "--priors sd_lineage=half_normal:1.5 beta=normal:5 --rng 1 --key-added mine --out {}/out.h5ad "
        "--figure {}/figure.png",
        capsys,
    )
    assert code == 0, err
    assert (folder / "in.h5ad").read_bytes() == before
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"
    priors = {"sd_lineage": ("half_normal", 1.5), "beta": ("normal", 5.0)}
    api = cf.tl.decompose(
        simulated, "fate", family="bernoulli", formula="~1+x", lengthscale=0.5, priors=priors, rng=1, copy=True
    )
    back = anndata.read_h5ad(folder / "out.h5ad")
    for scale in ("latent", "link", "realized"):
        pd.testing.assert_frame_equal(
            cf.get.components(back, "mine", scale=scale), cf.get.components(api, scale=scale), check_dtype=False
        )
    pd.testing.assert_frame_equal(cf.get.effects(back, "mine"), cf.get.effects(api), check_names=False)
    lineage = cf.get.components(api).set_index("component").loc["lineage"]
    assert re.search(rf"^lineage +{re.escape(show.short(lineage.variance))} .* {lineage.share:.3f} ", out, re.MULTILINE)
    assert re.search(r"^x +", out, re.MULTILINE)
    assert re.search(r"^lengthscale_spatial +0.500 +\[0.500, 0.500\]$", out, re.MULTILINE)
    assert "cellfate:" not in out


def test_a_key_serves_as_tree_and_none_leaves_out(folder, capsys, simulated):
    simulated.write_h5ad(folder / "in.h5ad")
    code, _, err = run(
        folder,
        "decompose {}/in.h5ad --fate fate --family bernoulli --tree tree --spatial none --out {}/out.h5ad",
        capsys,
    )
    assert code == 0, err
    assert set(cf.get.components(anndata.read_h5ad(folder / "out.h5ad"))["component"]) == {"lineage"}


def test_several_trees_are_fitted_and_pooled(folder, capsys, simulated):
    (folder / "two.nwk").write_text(
        simulated.uns["tree"].replace("cell7:", "x:").replace("cell9:", "cell7:").replace("x:", "cell9:")
    )
    arguments = "--fate fate --family bernoulli --spatial none --tree-weights 3 1 --out {}/out.h5ad"
    code, out, err = run(folder, f"decompose {{}}/in.h5ad --tree {{}}/tree.nwk {{}}/two.nwk {arguments}", capsys)
    assert code == 0, err
    assert re.search(r"^lineage ", out, re.MULTILINE)
    table = cf.get.trees(anndata.read_h5ad(folder / "out.h5ad"))
    assert table["tree"].tolist() == ["tree_tree", "tree_two"]
    assert table["weight"].tolist() == [0.75, 0.25]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--tree {}/tree.nwk none", "'none' leaves ancestry out, and stands alone"),
        ("--tree {}/tree.nwk {}/tree.nwk", "the data have a tree called 'tree_tree'; give --tree tree_tree"),
        ("--tree {}/tree.nwk --tree-weights equal", "but lineage is one tree"),
        ("--tree {}/tree.nwk --tree-weights 1 x", "give evidence, equal, or a number for each tree"),
    ],
)
def test_trees_that_cannot_be_meant(folder, capsys, words, text):
    code, out, err = run(folder, f"{START} {words} --out {{}}/out.h5ad", capsys)
    assert (code, out) == (2, "")
    assert text in err


def test_the_input_is_overwritten_if_it_is_named_twice_and_that_is_asked_for(folder, capsys):
    arguments = "--fate fate --family bernoulli --tree none --groups clone --spatial none"
    before = (folder / "in.h5ad").read_bytes()
    code, out, err = run(folder, f"decompose {{}}/in.h5ad {arguments} --out {{}}/in.h5ad", capsys)
    assert (code, out) == (2, "")
    assert "in.h5ad is the input: name another file, or give --overwrite" in err
    assert (folder / "in.h5ad").read_bytes() == before
    code, _, err = run(folder, f"decompose {{}}/in.h5ad {arguments} --out {{}}/in.h5ad --overwrite", capsys)
    assert code == 0, err
    assert "cellfate" in anndata.read_h5ad(folder / "in.h5ad").uns


START = "decompose {}/in.h5ad --fate fate --family bernoulli"
WRONG = {
    "no input": ("decompose {}/none.h5ad --fate fate --family bernoulli --out {}/out.h5ad", "There is no file .*none.h5ad"),
    "no HDF5": ("decompose {}/text.h5ad --fate fate --family bernoulli --out {}/out.h5ad", "text.h5ad cannot be read as"),
    "csv": ("decompose {}/tree.nwk --fate fate --family bernoulli --out {}/out.h5ad", "ends in '.nwk': use .h5ad"),
    "out csv": (START + " --out {}/out.csv", "out.csv ends in '.csv'"),
    "out elsewhere": (START + " --out {}/no/out.h5ad", "There is no folder .*/no for out.h5ad"),
    "out of another format": (START + " --out {}/out.h5td", "differ in format: keep .h5ad"),
    "figure of no kind": (START + " --out {}/out.h5ad --figure {}/f.docx", "'.docx': a figure is one of .png"),
    "figure elsewhere": (START + " --out {}/out.h5ad --figure {}/no/f.png", "no folder .*/no for f.png"),
    "no tree": (START + " --out {}/out.h5ad", "in.h5ad holds no tree 'tree': give --tree FILE_OR_KEY, or --tree none"),
    "out is there": (START + " --out {}/text.h5ad", "text.h5ad is there already: name another file, or give --overwrite"),
    "no such tree": (START + " --tree {}/t.nwk --out {}/out.h5ad", r"no such file and no such key; the data have uns \['truth'\]"),
    "broken tree": (START + " --tree {}/broken.nwk --out {}/out.h5ad", "parenthes"),
    "tree of others": (START + " --tree {}/other.nwk --out {}/out.h5ad", "cell"),
    "missing": (START + " --tree {}/tree.nwk --missing ignore --out {}/out.h5ad", "missing is 'ignore'"),
    "no fate": ("decompose {}/in.h5ad --fate no --family bernoulli --tree {}/tree.nwk --out {}/out.h5ad", "'no'"),
    "no such family": ("decompose {}/in.h5ad --fate fate --family binary --tree {}/tree.nwk --out {}/out.h5ad", "unknown family 'binary'"),
    "prior in words": (START + " --tree {}/tree.nwk --priors sd_lineage=half_normal:two --out {}/out.h5ad", "not all numbers"),
    "prior of nothing": (START + " --tree {}/tree.nwk --priors flat --out {}/out.h5ad", "write NAME=PRIOR"),
    "unknown prior": (START + " --tree {}/tree.nwk --priors sd_lineage=cauchy:1 --out {}/out.h5ad", "cauchy"),
    "unknown method": (START + " --tree {}/tree.nwk --method magic --out {}/out.h5ad", "magic"),
    "unknown device": (START + " --tree {}/tree.nwk --device abacus --out {}/out.h5ad", "device 'abacus' is unknown"),
    "no number": (START + " --lengthscale long --out {}/out.h5ad", "argument --lengthscale: invalid float value"),
    "no out": (START, "give --out FILE for the data with the results"),
    "no command": ("", "required: COMMAND"),
    "unknown command": ("compose", "invalid choice"),
    "unknown option": (START + " --out {}/out.h5ad --speed 3", "unrecognized arguments: --speed 3"),
    "demo without cells": ("demo --n 0", "n"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_one_line_and_code_2(what, folder, capsys):
    text, message = WRONG[what]
    code, out, err = run(folder, text, capsys)
    assert code == 2
    assert re.search(message, err), err
    assert re.match(r"cellfate[a-z ]*: error: ", err)
    assert err.count("\n") == 1
    assert out == ""
    assert sorted(p.name for p in folder.iterdir()) == ["broken.nwk", "in.h5ad", "other.nwk", "text.h5ad", "tree.nwk"]


def test_the_input_under_another_name_is_not_overwritten(folder, capsys):
    (folder / "out.h5ad").symlink_to(folder / "in.h5ad")
    before = (folder / "in.h5ad").read_bytes()
    code, _, err = run(folder, START + " --tree {}/tree.nwk --out {}/out.h5ad", capsys)
    assert code == 2
    assert "under another name: give the same name twice" in err
    assert (folder / "in.h5ad").read_bytes() == before


def test_a_failing_fit_leaves_older_results_alone(folder, capsys, monkeypatch):
    def fail(adata, fate, **_):
        adata.uns["cellfate"] = "half of it"
        raise DataError("the fit\nfailed")

    monkeypatch.setattr(cf.tl, "decompose", fail)
    (folder / "out.h5ad").write_text("older results")
    code, _, err = run(folder, START + " --tree {}/tree.nwk --out {}/out.h5ad --overwrite", capsys)
    assert (code, err) == (2, "cellfate: error: the fit failed\n")
    assert (folder / "out.h5ad").read_text() == "older results"


def test_a_bug_is_not_passed_off_as_bad_input(folder, monkeypatch):
    def crash(adata, fate, **_):
        raise ZeroDivisionError

    monkeypatch.setattr(cf.tl, "decompose", crash)
    words = (START + " --tree {}/tree.nwk --out {}/out.h5ad").replace("{}", str(folder)).split()
    with pytest.raises(ZeroDivisionError):
        cli.main(words)


class OutOfMemoryError(RuntimeError):  # torch.OutOfMemoryError cannot be made without a device
    pass


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError("Unable to allocate 3 GiB"), r"out of memory \(Unable to allocate 3 GiB\)\. Take fewer cells"),
        (OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "out of memory"),
        (torch.linalg.LinAlgError("linalg.cholesky: not positive-definite"), "a matrix could not be solved .*cholesky"),
        (np.linalg.LinAlgError("SVD did not converge"), "a matrix could not be solved .SVD"),
    ],
)
def test_a_machine_that_is_too_small_is_one_line(folder, capsys, monkeypatch, error, text):
    def fail(adata, fate, **_):
        raise error

    monkeypatch.setattr(cf.tl, "decompose", fail)
    code, out, err = run(folder, START + " --tree {}/tree.nwk --out {}/out.h5ad", capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.match(f"cellfate: error: {text}", err), err


def test_other_runtime_errors_are_bugs(folder, monkeypatch):
    def crash(adata, fate, **_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(cf.tl, "decompose", crash)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main((START + " --tree {}/tree.nwk --out {}/out.h5ad").replace("{}", str(folder)).split())


@pytest.fixture
def called(monkeypatch):
    """What the command passes on; nothing is fitted, written or printed."""
    calls = []
    monkeypatch.setattr(cf.tl, "decompose", lambda adata, fate, **options: calls.append((adata, options)))
    monkeypatch.setattr(fit, "print_tables", lambda adata, key: None)
    return calls


def test_a_tree_from_a_file_stands_beside_the_one_that_is_there(folder, capsys, caplog, called, simulated):
    simulated.write_h5ad(folder / "in.h5ad")
    code, _, _ = run(folder, START + " --tree {}/tree.nwk --out {}/out.h5ad", capsys)
    assert code == 0
    assert "uns['tree'] is left as it is: the tree of" in caplog.text
    ((adata, options),) = called
    assert options["lineage"] == "tree_tree"
    assert adata.uns["tree"] == simulated.uns["tree"]
    code, _, err = run(
        folder, "decompose {}/out.h5ad --fate fate --family bernoulli --tree {}/tree.nwk --out {}/3.h5ad", capsys
    )
    assert code == 2
    assert "give --tree tree_tree to use it" in err


@pytest.mark.parametrize(
    ("words", "groups"),
    [
        (["none"], []),
        (["batch", "half"], ["batch", "half"]),
        (["batch", "embryo=~ 1 + time"], {"batch": "~ 1", "embryo": "~ 1 + time"}),
        (["odd=name"], ["odd=name"]),
    ],
)
def test_groups_and_their_formulas(words, groups):
    assert fit._groups(words) == groups


def test_a_group_has_one_formula():
    with pytest.raises(DataError, match="a column is given twice"):
        fit._groups(["batch=~ 1", "batch=~ 0 + time"])


def test_groups_none_and_the_usual_seed(folder, capsys, called):
    code, _, _ = run(folder, START + " --tree {}/tree.nwk --groups none --out {}/out.h5ad", capsys)
    assert code == 0
    assert called[0][1]["groups"] == []
    assert called[0][1]["rng"] == 0


def test_results_are_on_disk_before_they_are_on_screen(folder, capsys, called, monkeypatch):
    def broken_pipe(adata, key):
        raise BrokenPipeError("nobody reads")

    monkeypatch.setattr(fit, "print_tables", broken_pipe)
    run(folder, START + " --tree {}/tree.nwk --out {}/out.h5ad", capsys)
    assert (folder / "out.h5ad").exists()


def test_our_warnings_are_one_line_and_no_error(folder, capsys):
    text = (folder / "tree.nwk").read_text()
    (folder / "tree.nwk").write_text(text.replace("cell7:", "gone:"))
    code, _, err = run(folder, START + " --tree {}/tree.nwk --missing drop --lengthscale 0.5 --out {}/out.h5ad", capsys)
    assert code == 0, err
    (line,) = (line for line in err.splitlines() if "cellfate: warning: 1 of 40 cells" in line)
    assert "cell7" in line
    effects = cf.get.effects(anndata.read_h5ad(folder / "out.h5ad"))
    assert list(effects.index[effects.isna().all(axis=1)]) == ["cell7"]


def test_demo_prints_truth_beside_estimate(tmp_path, capsys):
    code, out, err = run(tmp_path, "demo --n 60 --seed 4 --figure {}/demo.png", capsys)
    assert code == 0, err
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    adata = cf.datasets.simulate(60, family="bernoulli", **cli.DEMO_TRUTH, rng=4)
    cf.tl.decompose(adata, "fate", family="bernoulli", rng=4)
    row = cf.get.components(adata).set_index("component").loc["lineage"]
    words = next(line for line in out.splitlines() if line.startswith("variance lineage")).split()
    interval = f"[{show.short(row.variance_lower)}, {show.short(row.variance_upper)}]".split()
    verdict = cf.get.diagnostics(adata)["verdict"]
    assert verdict.startswith("weak")
    assert out.rstrip().endswith(f"{verdict}\n{show.FIRST_ASK} with cf.tl.test_components(adata).")
    assert words == ["variance", "lineage", show.short(2.0), show.short(row.variance), *interval]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sd_lineage=half_normal:2", ("sd_lineage", ("half_normal", 2.0))),
        ("lengthscale_spatial=lognormal:0.5:1", ("lengthscale_spatial", ("lognormal", 0.5, 1.0))),
        ("sd_batch=flat", ("sd_batch", "flat")),
    ],
)
def test_priors_read_as_the_api_takes_them(text, expected):
    assert fit._prior(text) == expected


@pytest.mark.parametrize(
    ("x", "text"),
    [(0.0, "0"), (1.0, "1.00"), (0.98765, "0.988"), (123.4, "123"), (1234.5, "1234"), (-0.25, "-0.250"), (1e-5, "1.00e-05"), (123456, "1.23e+05")],
)  # fmt: skip
def test_numbers_are_three_digits(x, text):
    assert show.short(x) == text


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"cellfate {cf.__version__}\n"


def test_columns_line_up():
    text = show.columns([("a", "bb"), ("ccc", "d")])
    assert text.splitlines() == ["a    bb", "ccc   d"]
    assert np.ptp([len(line) for line in text.splitlines()]) == 0


def test_many_fates_in_one_call(folder, capsys, simulated):
    adata = anndata.AnnData(
        np.random.default_rng(0).poisson(3.0, (simulated.n_obs, 3)).astype(float),
        obs=simulated.obs,
        obsm=dict(simulated.obsm),
        uns=dict(simulated.uns),
    )
    adata.var_names = ["a", "b", "c"]
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(folder / "genes.h5ad")
    code, out, err = run(
        folder,
        "decompose {}/genes.h5ad --fate c a --layer counts --family poisson --lengthscale 0.5 --chunk-size 1 --rng 1 "
        "--out {}/many.h5ad --overwrite",
        capsys,
    )
    assert code == 0, err
    api = cf.tl.decompose(adata, ["c", "a"], layer="counts", family="poisson", lengthscale=0.5, rng=1, copy=True)
    back = anndata.read_h5ad(folder / "many.h5ad")
    pd.testing.assert_frame_equal(cf.get.components(back), cf.get.components(api), check_dtype=False)
    assert "2 fates: 0 failed" in out
    assert out.splitlines()[1].split()[0] == "c"
