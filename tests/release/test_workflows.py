"""The workflows: pinned, with as few rights as they need, and nothing of a stranger's in a shell.

`make audit-workflows` checks more, with zizmor and GitHub's own schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
VERBS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)

PIN = re.compile(r"[\w.-]+(?:/[\w.-]+)+@[0-9a-f]{40} # v\d+(?:\.\d+)*")
USES = re.compile(r"^\s*(?:- )?uses: *(.*?) *$", re.MULTILINE)
LEAST = ({}, {"contents": "read"})
FORBIDDEN = {"pull_request_target", "workflow_run"}
"""They run with the rights of the repository on what strangers wrote."""
OUR_OWN = re.compile(r"\$\{\{ *matrix\.[\w.-]+ *\}\}")
"""The only values that a script may have in its text; all others go through `env`."""

ON = True
"""What YAML reads the key `on` as."""

Workflow = dict[Any, Any]


def steps_of(workflow: Workflow) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job.get("steps", [])


def unpinned(text: str, _: Workflow) -> list[str]:
    return [name for name in USES.findall(text) if not PIN.fullmatch(name)]


def rights_of_all_jobs(_: str, workflow: Workflow) -> list[str]:
    rights = workflow.get("permissions")
    return [] if rights in LEAST else [f"permissions: {rights}"]


def rights_without_bounds(_: str, workflow: Workflow) -> list[str]:
    rights = {name: job.get("permissions", {}) for name, job in workflow["jobs"].items()}
    return [name for name, own in rights.items() if not isinstance(own, dict)]


def kept_credentials(_: str, workflow: Workflow) -> list[str]:
    checkouts = (s for s in steps_of(workflow) if s.get("uses", "").startswith("actions/checkout@"))
    kept = (s for s in checkouts if s.get("with", {}).get("persist-credentials") is not False)
    return [step["uses"] for step in kept]


def events_of_strangers(_: str, workflow: Workflow) -> list[str]:
    events = workflow[ON]
    return sorted(FORBIDDEN.intersection([events] if isinstance(events, str) else events))


def values_in_scripts(_: str, workflow: Workflow) -> list[str]:
    scripts = [step.get("run", "") for step in steps_of(workflow)]
    return [line for run in scripts for line in OUR_OWN.sub("", run).splitlines() if "${{" in line]


def jobs_without_end(_: str, workflow: Workflow) -> list[str]:
    jobs = workflow["jobs"].items()
    return [name for name, job in jobs if "uses" not in job and "timeout-minutes" not in job]


def verbs_that_are_not_there(_: str, workflow: Workflow) -> list[str]:
    lines = [line for s in steps_of(workflow) for line in s.get("run", "").splitlines()]
    words = [line.split()[1:] for line in lines if line.split()[:1] == ["make"]]
    named = [word for own in words for word in own if "=" not in word and word[0].isalpha()]
    return [word for word in named if word not in VERBS]


def empty_variables(_: str, workflow: Workflow) -> list[str]:
    """Variables that may be set and empty: uv, for one, takes that for a mistake."""
    jobs = workflow["jobs"].values()
    tables = [
        workflow.get("env", {}),
        *(own.get("env", {}) for own in [*jobs, *steps_of(workflow)]),
    ]
    rows = [row for table in tables for row in table.items()]
    return [name for name, value in rows if name.startswith("UV_") and "${{" in str(value)]


CHECKS: list[Callable[[str, Workflow], list[str]]] = [
    unpinned,
    rights_of_all_jobs,
    rights_without_bounds,
    kept_credentials,
    events_of_strangers,
    values_in_scripts,
    jobs_without_end,
    verbs_that_are_not_there,
    empty_variables,
]
BAD = {
    unpinned: "jobs: {a: {steps: [\n  uses: actions/checkout@v7\n]}}",
    rights_of_all_jobs: "permissions: {contents: write}",
    rights_without_bounds: "jobs: {a: {permissions: write-all}}",
    kept_credentials: "jobs: {a: {steps: [{uses: actions/checkout@v7, with: {ref: main}}]}}",
    events_of_strangers: "on: [push, pull_request_target]",
    values_in_scripts: "jobs: {a: {steps: [{run: 'echo ${{ github.event.issue.title }}'}]}}",
    jobs_without_end: "jobs: {a: {runs-on: ubuntu-24.04}}",
    verbs_that_are_not_there: "jobs: {a: {steps: [{run: make everything LOCK=}]}}",
    empty_variables: "jobs: {a: {env: {UV_TORCH_BACKEND: \"${{ matrix.torch && 'cpu' || '' }}\"}}}",
}


def by_name(value: object) -> str:
    return value.name if isinstance(value, Path) else getattr(value, "__name__", "")


@pytest.mark.parametrize("check", CHECKS, ids=by_name)
@pytest.mark.parametrize("path", WORKFLOWS, ids=by_name)
def test_workflows(path: Path, check: Callable[[str, Workflow], list[str]]) -> None:
    text = path.read_text(encoding="utf-8")
    assert check(text, yaml.safe_load(text)) == []


@pytest.mark.parametrize("check", CHECKS, ids=by_name)
def test_a_fault_is_found(check: Callable[[str, Workflow], list[str]]) -> None:
    text = BAD[check]
    workflow = {"jobs": {}, "permissions": {}, ON: "push"} | yaml.safe_load(text)
    assert check(text, workflow) != []


def test_an_action_has_one_version() -> None:
    pins: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for pin in USES.findall(path.read_text(encoding="utf-8")):
            name, _, version = pin.partition("@")
            pins.setdefault(name, set()).add(version)
    assert {name: own for name, own in pins.items() if len(own) > 1} == {}
    assert pins


def test_the_gate_waits_for_every_job() -> None:
    path = ROOT / ".github" / "workflows" / "ci.yml"
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    assert {*jobs["passed"]["needs"], "passed"} == set(jobs)
    assert jobs["passed"]["if"] == "always()"
