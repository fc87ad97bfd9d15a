"""The release workflow builds, tries and attests every target, and publishes for a tag alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text("utf-8"))
JOBS = WORKFLOW["jobs"]
RIGHTS = {
    "attest": {"attestations": "write", "id-token": "write"},
    "attest-sbom": {"attestations": "write", "id-token": "write"},
    "pypi": {"id-token": "write"},
    "github": {"actions": "write", "contents": "write"},
}
"""The jobs that publish, and what each may."""


def rows(job):
    return JOBS[job]["strategy"]["matrix"]["include"]


def needed(job):
    """The jobs that must have passed before a job."""
    direct = JOBS[job].get("needs", [])
    names = {direct} if isinstance(direct, str) else set(direct)
    return names.union(*(needed(name) for name in names))


def test_a_wheel_is_built_for_every_target():
    assert [row["triple"] for row in rows("wheel")] == [own.triple for own in TARGETS]


def test_every_wheel_is_tried_on_an_old_and_a_new_python():
    tried = sorted(row["triple"] for job in ("try", "try-musl") for row in rows(job))
    assert tried == sorted(2 * [own.triple for own in TARGETS])


def test_every_wheel_has_its_sbom_attested():
    assert JOBS["attest-sbom"]["strategy"]["matrix"]["tag"] == [own.tag for own in TARGETS]


def test_no_other_job_may_more_than_read():
    rights = {name: job["permissions"] for name, job in JOBS.items()}
    assert rights == {name: RIGHTS.get(name, {"contents": "read"}) for name in JOBS}
    assert WORKFLOW["permissions"] == {}


@pytest.mark.parametrize("job", RIGHTS)
def test_publishing_needs_a_tag_and_all_trials(job):
    assert WORKFLOW[True] == {"push": {"tags": ["v*"]}, "workflow_dispatch": None}
    assert JOBS[job]["if"] == "github.event_name == 'push'"
    assert needed(job) >= {"version", "wheel", "sdist", "try", "try-musl", "files"}


def test_pypi_trusts_one_environment():
    assert JOBS["pypi"]["environment"]["name"] == "pypi"
    assert all("environment" not in job for name, job in JOBS.items() if name != "pypi")
