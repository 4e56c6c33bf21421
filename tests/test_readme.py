"""What the README says to type works, and is what continuous integration runs."""

import re
from pathlib import Path

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


def test_the_quick_start_runs():
    (code,) = blocks("python")
    names = {}
    exec(code, names)
    assert names["adata"].uns["cellfate"]["components"]["variance"].notna().all()


def test_the_options_in_the_readme_exist():
    from cellfate import cli

    line = blocks("bash")[2].replace("\\\n", " ")
    arguments = cli.parser().parse_args(line.split()[1:])
    assert arguments.fate == "marker_on"
