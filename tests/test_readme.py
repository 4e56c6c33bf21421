"""What the README says to type works, and is what continuous integration runs."""

import io
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import cellfate as cf

ROOT = Path(cf.__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="installed without its repository")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_ci_runs_the_commands_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text()
    demo, test = [block.strip() for block in blocks("bash")[:2]]
    assert f"readme_demo() {{ {demo}; }}" in ci
    assert f"readme_test() {{ {test}; }}" in ci


@pytest.mark.filterwarnings("ignore:elpd_loo of:cellfate.errors.CellfateWarning")  # the README says so
def test_the_quick_start_runs_and_gives_what_it_says(tmp_path, monkeypatch):
    (code, *more), (text,) = blocks("python"), blocks("text")
    names = {"__name__": "__main__"}
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    adata = names["adata"]
    for block in more:
        exec(block, names)
    assert (cf.get.responses(names["genes"])["status"].str.startswith("failed")).sum() == 0
    assert len(names["genes"].varm["cellfate_shares"]) == 3
    verdict, *tables = text.strip().split("\n\n")
    assert verdict == cf.get.diagnostics(adata)["verdict"]
    getters = (cf.get.components, cf.get.fixed_effects, cf.get.hyperparameters)
    for printed, getter in zip(tables, getters, strict=True):
        shown = pd.read_csv(io.StringIO(printed), sep=r"\s+", index_col=0)
        found = getter(adata).set_index(shown.index.name)
        assert list(found.index) == list(shown.index)
        # two digits are printed, and machines differ in a last digit that the search for the mode enlarges
        np.testing.assert_allclose(shown, found[shown.columns], rtol=0.05, atol=0.03)


def test_ci_finds_the_data_by_what_the_folder_holds(tmp_path):
    """Two folders beside the repository are called data; one is the data. Where CELLFATE_DATA is set, that one counts."""
    ci = (ROOT / ".ci" / "run").read_text()
    (search,) = re.findall(r"^if \[\[ -z \"\$\{CELLFATE_DATA.*?^fi$", ci, re.DOTALL | re.MULTILINE)
    (tmp_path / "repository").mkdir()
    (tmp_path / "a" / "data").mkdir(parents=True)
    data = tmp_path / "b" / "data"
    (data / "ascidian_embryos").mkdir(parents=True)
    (data / "README.md").touch()
    script = f'set -euo pipefail; {search}\necho "${{CELLFATE_DATA:-none}}"'

    def found(**variables):
        environment = {"PATH": os.environ["PATH"], **variables}
        run = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path / "repository",
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.strip()

    assert found() == str(data)
    assert found(CELLFATE_DATA="/elsewhere") == "/elsewhere"
    (data / "README.md").unlink()
    assert found() == "none"


def test_the_options_in_the_readme_exist():
    from cellfate import cli

    line = blocks("bash")[2].replace("\\\n", " ")
    arguments = cli.parser().parse_args(line.split()[1:])
    assert arguments.fate == ["marker_on"]


def test_the_commands_of_a_cluster_exist(tmp_path):
    import tomllib

    from cellfate import cli

    (script, commands), (config,) = blocks("bash")[3:5], blocks("toml")
    (tmp_path / "job.toml").write_text(config)
    lines = [line.removeprefix("exec ") for line in (script + commands).replace("\\\n", " ").splitlines()]
    lines = [line.replace("job.toml", str(tmp_path / "job.toml")) for line in lines if line.startswith("cellfate ")]
    assert [line.split()[1] for line in lines] == ["decompose", "decompose", "status", "merge"]
    found = [cli.parser().parse_args(cli.configured(line.split()[1:])) for line in lines]
    assert found[0].workers == 16
    assert (found[1].scheduler, found[1].workers, found[1].chunk_size) == ("slurm", 40, "auto")
    assert tomllib.loads(config)["slurm"]["memory"] == "8GB"
    assert script.startswith("#!/bin/bash\n#SBATCH ")
