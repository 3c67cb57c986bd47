"""What the README and the pages say is true of the code: their blocks run, and the names in them exist."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
import torch

import orthogonium as og
from orthogonium import reparametrizers, testing
from orthogonium.cli import main
from orthogonium.cli.main import _parser

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
INSTALL = 'python3 -m venv .venv && .venv/bin/pip install -e ".[{}]" && .venv/bin/python -m {}'
RUN = "runs/digits-default-seed0"
SMALL = ["--epochs", "1", "--width", "8", "--depth", "2", "--attack-steps", "0"]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """Arguments of every ``python -m orthogonium ...`` in the shell blocks of a page."""
    lines = "".join(blocks(text, "bash")).splitlines()
    return [
        shlex.split(line.partition("python -m orthogonium")[2], comments=True)
        for line in lines
        if "python -m orthogonium" in line
    ]


def parsers():
    """The parser of each command, by its name."""
    (choice,) = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return choice.choices


def flags(parser):
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


@pytest.fixture(scope="module")
def folder_with_a_run(tmp_path_factory):
    """A working directory in which the run that the pages speak of is there."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", *SMALL, "--out", RUN]) == 0
    return folder


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if blocks(text, "python")])
def test_python_blocks_run_in_order(page, folder_with_a_run, monkeypatch):
    monkeypatch.chdir(folder_with_a_run)
    torch.manual_seed(0)
    namespace = {"__name__": "page"}
    for number, block in enumerate(blocks(TEXTS[page], "python"), 1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if commands(text)])
def test_commands_run(page, folder_with_a_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder_with_a_run)
    if "save_run(" in TEXTS[page]:  # the commands are about a folder that the page itself makes
        monkeypatch.chdir(tmp_path)
        exec(compile("".join(blocks(TEXTS[page], "python")), page, "exec"), {"__name__": "page"})
    for number, arguments in enumerate(commands(TEXTS[page])):
        if "--resume" in arguments:  # needs an interrupted run
            _parser().parse_args(arguments)
            continue
        cheaper = {
            "train": [*SMALL, "--out", f"runs/{Path(page).stem}-{number}"],
            "certify": ["--steps", "2", "--restarts", "1"],
        }
        assert main([*arguments, *cheaper.get(arguments[0], [])]) == 0, capsys.readouterr().err


def test_the_two_commands_stand_on_the_first_screen_and_ci_runs_the_second():
    first_screen = README.read_text(encoding="utf-8").splitlines()[:20]
    assert INSTALL.format("demo", "orthogonium train") in first_screen
    assert INSTALL.format("test", "pytest") in first_screen
    assert INSTALL.format("test", "pytest") in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_flag_is_documented_and_every_documented_flag_exists():
    text = TEXTS["docs/demo.md"]
    table, rest = text.split("## Flags of `train`")[1].split("\n`certify RUN`")
    documented = set(re.findall(r"^\| `(--[a-z-]+)`", table, re.MULTILINE))
    assert documented == flags(parsers()["train"]) - {"--help"}
    certify, inspect = rest.split("`inspect RUN`")
    for name, said in (("certify", certify), ("inspect", inspect.split("\n\n")[0])):
        assert set(re.findall(r"`(--[a-z-]+)`", said)) == flags(parsers()[name]) - {"--help"}


def test_defaults_in_the_table_of_flags_are_those_of_the_parser():
    options = vars(_parser().parse_args(["train"])) | {
        field: getattr(og.training.TrainConfig(), field) for field in og.training.TrainConfig.__annotations__
    }
    rows = re.findall(r"^\| `--([a-z-]+)` \| `?([\w.]+)`? \|", TEXTS["docs/demo.md"], re.MULTILINE)
    assert len(rows) > 8
    for flag, value in rows:
        expected = {"recipe": "balanced"}.get(flag, options[flag.replace("-", "_")])
        assert value == f"{expected:g}" if isinstance(expected, float) else value == str(expected)


@pytest.mark.parametrize("page", TEXTS)
def test_presets_that_are_named_exist(page):
    for name in re.findall(r"\b[A-Z_]+_ORTHO_PARAMS\b", TEXTS[page]):
        assert hasattr(reparametrizers, name)


@pytest.mark.parametrize("page", ["README.md", "docs/presets.md", "docs/api/reparametrizers.md"])
def test_every_preset_is_described(page):
    names = {name for name in vars(reparametrizers) if name.endswith("_ORTHO_PARAMS")}
    assert {name for name in names if f"`{name}`" in TEXTS[page]} == names


def test_presets_have_the_command_line_names_that_the_table_gives_them():
    rows = re.findall(r"^\| `(\w+_ORTHO_PARAMS)` \| `(\w+)` \|", TEXTS["docs/presets.md"], re.MULTILINE)
    assert {short: getattr(reparametrizers, name) for name, short in rows} == og.PRESETS
    listed = re.search(r"^\| `--preset` .*$", TEXTS["docs/demo.md"], re.MULTILINE).group()
    assert set(og.PRESETS) <= set(re.findall(r"`(\w+)`", listed))


def test_every_public_name_is_in_the_api_pages():
    reference = "".join(text for name, text in TEXTS.items() if name.startswith("docs/api/"))
    documented = set(re.findall(r"^::: [\w.]+\.(\w+)$", reference, re.MULTILINE))
    listed = set(re.findall(r"`(\w+)`", reference))
    public = set(og.__all__) - {"__version__"}
    for room in (
        og.layers,
        og.certification,
        og.diagnostics,
        og.initialization,
        og.linalg,
        og.optim,
        og.surgery,
        testing,
        og.training,
        reparametrizers,
    ):
        public |= set(room.__all__)
    internal = {"constrain", "in_working_precision"}
    constants = {name for name in public if name.isupper()}
    assert public - internal - constants <= documented
    assert constants - {"MODELS", "RECIPES"} <= listed | documented


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[page]):
        assert (ROOT / target).exists(), target


def test_citation_names_this_version():
    fields = dict(line.split(": ", 1) for line in (ROOT / "CITATION.cff").read_text().splitlines() if ": " in line)
    assert og.__version__.startswith(fields["version"])
    assert f"## [{fields['version']}]" in (ROOT / "CHANGELOG.md").read_text()
