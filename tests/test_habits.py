"""Versions, workflows, issue forms and project metadata agree with the code and with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

import memkernels as mk

yaml = pytest.importorskip("ruamel.yaml")
toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

HOME = "https://github.com/memkernels/memkernels"
GITHUB = ROOT / ".github"
PROJECT = toml.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
TARGETS = set(" ".join(re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)).split())
PYTHONS = [c.split()[-1] for c in PROJECT["project"]["classifiers"] if re.search(r"Python :: 3\.\d", c)]
OLDEST_TORCH = re.search(r"torch>=([\d.]+)", " ".join(PROJECT["project"]["dependencies"]))[1]


def read(path: Path) -> dict:
    return yaml.YAML(typ="safe").load(path)


def jobs() -> list[tuple[str, dict]]:
    return [(f"{path.name}: {name}", job) for path in WORKFLOWS for name, job in read(path)["jobs"].items()]


def steps() -> list[tuple[str, dict]]:
    setup = GITHUB / "actions" / "setup" / "action.yml"
    own = [(str(setup), step) for step in read(setup)["runs"]["steps"]]
    return own + [(name, step) for name, job in jobs() for step in job["steps"]]


def made(commands: str) -> set[str]:
    """The targets that a script makes."""
    words = [line.split() for line in commands.splitlines() if line.startswith("make ")]
    return {word for line in words for word in line[1:] if re.fullmatch(r"[a-z-]+", word)}


# --- tools ---


@pytest.mark.parametrize(
    "tool, mirror",
    [
        ("ruff", "ruff-pre-commit"),
        ("clang-format", "mirrors-clang-format"),
        ("codespell", "codespell"),
        ("check-jsonschema", "check-jsonschema"),
    ],
)
def test_a_commit_is_checked_by_the_versions_of_requirements(tool, mirror):
    repos = read(ROOT / ".pre-commit-config.yaml")["repos"]
    (revision,) = (repo["rev"] for repo in repos if repo["repo"].endswith(f"/{mirror}"))
    assert revision.removeprefix("v") == PINS[tool]


SCHEMAS = {
    "vendor.github-workflows": ".github/workflows/*.yml",
    "custom.github-workflows-require-timeout": ".github/workflows/*.yml",
    "vendor.github-actions": ".github/actions/*/action.yml",
    "vendor.dependabot": ".github/dependabot.yml",
    "vendor.github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "vendor.github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "vendor.citation-file-format": "CITATION.cff",
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_follow_their_schema(schema):
    pytest.importorskip("check_jsonschema")
    files = sorted(ROOT.glob(SCHEMAS[schema]))
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


CPP = sorted(
    p
    for folder in ("csrc", "tests", "bench")
    for p in (ROOT / folder).rglob("*")
    if p.suffix in {".c", ".cpp", ".cu", ".h"}
)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_lint_formats_every_file_of_cpp():
    command = ["make", "--dry-run", "lint", "PYTHON=python"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {str(path.relative_to(ROOT)) for path in CPP} <= set(said)


# --- workflows ---


def test_workflows_run_targets_of_the_makefile():
    for name, step in steps():
        for command in step.get("run", "").splitlines():
            assert made(command) or "GITHUB_ENV" in command, f"{name}: {command}"
            assert made(command) <= TARGETS, f"{name}: {command}"


def test_workflows_run_all_that_one_machine_runs():
    run = {target for _, step in steps() for target in made(step.get("run", ""))}
    assert made((ROOT / ".ci" / "run").read_text()) <= run
    assert {"lint", "test", "test-torch", "docs", "sanitize", "wheel", "wheel-test", "gpu-check"} <= run


def test_workflows_may_read_alone_and_end():
    for path in WORKFLOWS:
        workflow = read(path)
        assert workflow["permissions"] == {"contents": "read"}, path
        assert workflow["concurrency"]["cancel-in-progress"] is True, path
    for name, job in jobs():
        assert job["timeout-minutes"] <= 120 and "permissions" not in job, name


def test_actions_have_versions():
    for name, step in steps():
        used = step.get("uses", "./")
        assert used.startswith("./") or re.search(r"^actions/[\w-]+@v\d+$|@v\d+\.\d+\.\d+$", used), f"{name}: {used}"
        assert not used.startswith("./.") or (ROOT / used / "action.yml").exists(), f"{name}: {used}"


def test_a_gpu_of_our_own_runs_no_code_of_strangers():
    for path in WORKFLOWS:
        workflow = read(path)
        if any("self-hosted" in job["runs-on"] for job in workflow["jobs"].values()):
            assert not [event for event in workflow["on"] if event.startswith("pull_request")], path


# --- versions ---


def test_workflows_test_every_python_that_the_package_names():
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert [f"3.{n}" for n in range(int(PYTHONS[0][2:]), int(PYTHONS[-1][2:]) + 1)] == PYTHONS
    listed = {name: job["strategy"]["matrix"]["python"] for name, job in jobs() if "strategy" in job}
    assert {name.split(": ")[1] for name in listed} == {"test", "oldest-torch", "installed"}
    for name, pythons in listed.items():
        assert pythons == PYTHONS, name
    alone = read(GITHUB / "actions" / "setup" / "action.yml")["inputs"]["python"]["default"]
    assert alone in PYTHONS


def test_the_oldest_torch_is_one_everywhere():
    versions = re.findall(r"test-torch VERSION=(\S+)", (GITHUB / "workflows" / "ci.yml").read_text())
    versions += re.findall(r"torch==(\S+)", " ".join(map(str, PROJECT["tool"]["cibuildwheel"].values())))
    assert versions == [f"{OLDEST_TORCH}.0"] * 3
    assert (
        f"OLDEST = ({OLDEST_TORCH.replace('.', ', ')})" in (ROOT / "build_backend" / "memkernels_build.py").read_text()
    )


# --- what the project says of itself ---


def test_addresses_lie_at_home():
    project = PROJECT["project"]
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= set(project["urls"])
    citation = read(ROOT / "CITATION.cff")
    addresses = [*project["urls"].values(), citation["url"], citation["repository-code"]]
    for page in (ROOT / "SECURITY.md", *GITHUB.rglob("*.yml")):
        addresses += re.findall(r"https://github\.com/\S+?(?=[\s)]|$)", page.read_text())
    assert {address[: len(HOME)] for address in addresses} == {HOME}
    for address in addresses:  # those of a file or a folder
        if found := re.search(r"/(?:blob|tree)/main/(.+)$", address):
            assert (ROOT / found[1]).exists(), address


def test_the_citation_is_of_this_version():
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == mk.__version__
    assert citation["license"] == PROJECT["project"]["license"]


def test_classifiers():
    classifiers = PROJECT["project"]["classifiers"]
    assert classifiers == sorted(
        classifiers, key=lambda c: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", c)]
    )
    assert "Typing :: Typed" in classifiers and (ROOT / "memkernels" / "py.typed").exists()
    assert not [c for c in classifiers if c.startswith("License ::")], (
        "setuptools refuses one beside a license expression"
    )


def test_reviewers_are_teams_and_their_paths_exist():
    for line in (GITHUB / "CODEOWNERS").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern, *owners = line.split()
            assert pattern == "*" or (ROOT / pattern.strip("/")).exists(), line
            assert owners and all(owner.startswith("@memkernels/") for owner in owners), line


def test_the_form_for_a_bug_asks_for_info():
    body = read(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")["body"]
    (info,) = (part for part in body if "python -m memkernels info" in part["attributes"]["label"])
    assert info["validations"]["required"] is True
