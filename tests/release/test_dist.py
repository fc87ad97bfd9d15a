"""`make dist`: what can be wrong with a release is found, and what was not run is said."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
from packaging.tags import sys_tags

import archive
import builder
import dist
import trial
from refusal import Refused, output
from targets import TARGETS, by_triple

LINUX = by_triple("x86_64-unknown-linux-gnu")
MUSL = by_triple("aarch64-unknown-linux-musl")


def auditwheel_says(tag):
    return f'a.whl is consistent with\nthe following platform tag:\n"{tag}".\n\nThe wheel …'


@pytest.mark.parametrize("tag", ["manylinux_2_28_x86_64", "manylinux_2_17_x86_64"])
def test_a_wheel_that_runs_on_its_linux_or_an_older_one(tag):
    assert dist.met_tag("a.whl", LINUX, auditwheel_says(tag)) == tag


@pytest.mark.parametrize(
    "tag",
    ["manylinux_2_34_x86_64", "manylinux_3_1_x86_64", "linux_x86_64", "manylinux_2_28_aarch64"],
)
def test_a_wheel_that_needs_another_linux(tag):
    with pytest.raises(Refused, match=rf"`a\.whl` does not meet its tag(.|\n)*{tag}"):
        dist.met_tag("a.whl", LINUX, auditwheel_says(tag))


def musl_says(**changed):
    facts = {"sym_tag": MUSL.tag, "versioned_symbols": {}, "external_libs": {"libc.so": None}}
    return "WARNING: no musl here\n" + json.dumps({**facts, **changed})


def test_a_wheel_for_musl():
    assert dist.met_musl_tag("a.whl", MUSL, musl_says()).startswith(MUSL.tag)
    assert dist.met_musl_tag("a.whl", MUSL, musl_says(external_libs={}))


@pytest.mark.parametrize(
    "changed",
    [
        {"external_libs": {"libc.so": None, "libgcc_s.so.1": None}},
        {"versioned_symbols": {"libc.so.6": ["GLIBC_2.17"]}},
        {"sym_tag": "linux_aarch64"},
    ],
)
def test_a_wheel_for_musl_that_needs_more(changed):
    with pytest.raises(Refused, match=r"`a\.whl` does not meet its tag"):
        dist.met_musl_tag("a.whl", MUSL, musl_says(**changed))


def test_the_targets_of_this_system():
    """One of them is a wheel that this Python installs."""
    installable = {tag.platform for tag in sys_tags()}
    native = dist.native()
    assert native
    assert [own for own in TARGETS if own.tag in installable] == [
        own for own in native if own.tag in installable
    ]
    assert any(own.tag in installable for own in native)


def test_a_system_without_wheels_is_named():
    with pytest.raises(ValueError, match="no wheel is made for `riscv64gc-unknown-linux-gnu`"):
        by_triple("riscv64gc-unknown-linux-gnu")


def test_the_files_of_a_release():
    program = builder.ROOT / "release" / "targets.py"
    names = output([sys.executable, program, "1.0.0"]).split()
    assert names[-1] == "qwenlora-1.0.0.tar.gz"
    assert len(set(names)) == len(TARGETS) + 1


def test_checksums_are_those_of_all_files(tmp_path, capsys):
    (tmp_path / "b.whl").write_bytes(b"b")
    (tmp_path / "a.tar.gz").write_bytes(b"a")
    (tmp_path / "folder").mkdir()
    for _ in range(2):  # the second time, without the checksums' own
        dist.write_sums(tmp_path, dist.Screen())
        a, b = (hashlib.sha256(data).hexdigest() for data in (b"a", b"b"))
        assert (tmp_path / dist.SUMS).read_text("utf-8") == f"{a}  a.tar.gz\n{b}  b.whl\n"
    assert "made     SHA256SUMS, 2 files" in capsys.readouterr().out


def test_the_screen_says_what_was_not_run(capsys):
    screen = dist.Screen()
    screen.passed("twine check --strict")
    screen.not_run("Python 3.14", "error: No interpreter found")
    screen.close()
    assert capsys.readouterr().out == (
        "ok       twine check --strict\n"
        "not run  Python 3.14: error: No interpreter found\n"
        "dist: 1 checks passed, not run: Python 3.14\n"
    )


@pytest.mark.slow
def test_a_python_that_is_nowhere_is_said(monkeypatch, capsys):
    said = "no Python `3.99`: .*No interpreter found for Python 3.99.*"
    with pytest.raises(trial.NoInterpreter, match=said):
        dist.try_wheels(dist.Screen(), LINUX.wheel("1.0.0"), ["3.99"], torch=None)
    monkeypatch.setattr(dist, "PYTHONS", ("3.99",))
    screen = dist.Screen()
    dist.try_all(screen, LINUX.wheel("1.0.0"), torch=None)
    screen.close()
    first, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"not run  Python 3\.99: {said}", first)
    assert last == "dist: 0 checks passed, not run: Python 3.99"


@pytest.mark.slow
def test_a_wheel_works_in_a_fresh_environment(wheel, tmp_path):
    said = trial.try_wheel(wheel, sys.executable, tmp_path)
    assert re.fullmatch(r"Python 3\.\d+\.\d+\w*", said)


@pytest.mark.slow
def test_a_wheel_whose_library_is_broken_does_not_pass(wheel, tmp_path):
    broken = tmp_path / wheel.name
    shutil.copy(wheel, broken)
    (library,) = (
        name
        for name in archive.read_wheel(broken)
        if name.startswith("qwenlora/_core.") and not name.endswith(".pyi")
    )
    archive.replace_in_wheel(broken, {library: b"not a library"})
    with pytest.raises(Refused, match=r"smoke\.py` ends with status 1"):
        trial.try_wheel(broken, sys.executable, tmp_path)


def test_what_the_extra_torch_names(wheel):
    names = {re.match(r"[\w-]+", line)[0] for line in trial.torch_requirements(wheel)}
    assert names == {"torch", "numpy", "safetensors"}


def test_a_program_that_fails_is_quoted():
    with pytest.raises(Refused, match=r"ends with status 3 and says:\nthe reason"):
        output([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"])


def test_a_program_that_is_missing_is_named():
    with pytest.raises(Refused, match="`no-such-program` cannot be run"):
        output(["no-such-program"])


@pytest.fixture
def clone(tmp_path):
    """A clone of what is committed."""
    folder = tmp_path / "a clone"
    subprocess.run(["git", "clone", "--quiet", builder.ROOT, folder], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("maturin", path=sysconfig.get_path("scripts")) is None, reason="needs maturin"
)
def test_the_sdist_of_a_clone(clone, tmp_path):
    (clone / "python" / "qwenlora" / "mine.py").write_text("", "utf-8")
    sdist = builder.build_sdist(tmp_path / "dist", root=clone)
    tracked = builder.tracked_files(clone)
    version = dist.read_version(clone)
    with pytest.raises(Refused, match=r"holds `python/qwenlora/mine\.py`, which git does not have"):
        archive.check_sdist(sdist, version=version, tracked=tracked)
    (clone / "python" / "qwenlora" / "mine.py").unlink()
    sdist = builder.build_sdist(tmp_path / "dist", root=clone)
    assert archive.check_sdist(sdist, version=version, tracked=tracked) > 300


def test_what_is_not_committed_is_seen(clone):
    assert builder.changed_files(clone) == []
    (clone / "new file").write_text("", "utf-8")
    assert builder.changed_files(clone) == ['?? "new file"']
