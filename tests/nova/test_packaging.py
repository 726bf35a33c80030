# SPDX-License-Identifier: Apache-2.0
"""Installing imgprealloc beside Nova, as the README says it, adds this one package."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

_REPOSITORY = pathlib.Path(__file__).parents[2]
_SITE_PACKAGES = pathlib.Path(sysconfig.get_path("purelib"))


def _with_all_that_they_require(names: Iterable[str]) -> dict[str, metadata.Distribution]:
    """Return distributions of this environment, and those that they need in turn."""
    found: dict[str, metadata.Distribution] = {}
    wanted = [Requirement(name) for name in names]
    seen = set()
    while wanted:
        requirement = wanted.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        distribution = metadata.distribution(requirement.name)
        found[canonicalize_name(requirement.name)] = distribution
        for line in distribution.requires or ():
            needed = Requirement(line)
            extras = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
            if needed.marker is None or any(map(needed.marker.evaluate, extras)):
                wanted.append(needed)
    return found


def _environment(path: pathlib.Path, distributions: Iterable[metadata.Distribution]) -> pathlib.Path:
    """Make an environment with nothing but distributions of this one, by links to them; return its Python."""
    venv.create(path, symlinks=True)
    packages = path / _SITE_PACKAGES.relative_to(sys.prefix)
    for distribution in distributions:
        for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (packages / name).exists():
                (packages / name).symlink_to(_SITE_PACKAGES / name)
    return path / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Build imgprealloc from a copy, because a build writes beside its sources."""
    source = tmp_path_factory.mktemp("source")
    left_out = shutil.ignore_patterns("*.egg-info", "build", "__pycache__")
    for name in ("imgprealloc", "nova"):
        shutil.copytree(_REPOSITORY / name, source / name, ignore=left_out)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "requirements.txt", "README.rst", "LICENSE"):
        shutil.copy(_REPOSITORY / name, source)
    target = tmp_path_factory.mktemp("wheel")
    # A copy has no git to tell the version.
    env = {**os.environ, "PBR_VERSION": "1.0.0"}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(target), str(source)]
    subprocess.run(command, env=env, cwd="/", check=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture
def beside_nova(tmp_path: pathlib.Path) -> pathlib.Path:
    """Make an environment with Nova, what Nova needs, and pip; the Python of it."""
    return _environment(tmp_path / "env", _with_all_that_they_require(["nova", "pip"]).values())


def _pip_would_install(python: pathlib.Path, *requirements: pathlib.Path | str) -> list[str]:
    """Ask pip, which knows no place to get another package from.

    :raises: AssertionError if it needs one, with pip's words
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    env["PIP_CONFIG_FILE"] = os.devnull
    report = python.with_name("report.json")
    command = [python, "-m", "pip", "install", "--dry-run", "--no-index", "--report", report, *requirements]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [str(item["metadata"]["name"]) for item in json.loads(report.read_text())["install"]]


def test_beside_nova_and_what_it_needs_pip_installs_imgprealloc_alone(
    beside_nova: pathlib.Path, wheel: pathlib.Path
) -> None:
    assert _pip_would_install(beside_nova, wheel) == ["imgprealloc"]


@pytest.mark.parametrize("requirement", ["pytest", "oslo.log>=9999"])
def test_package_that_nova_does_not_bring_or_not_as_new_is_noticed(
    beside_nova: pathlib.Path, wheel: pathlib.Path, requirement: str
) -> None:
    # The control: pytest is in this environment, but is none of Nova's.
    with pytest.raises(AssertionError, match=f"No matching distribution found for {requirement}"):
        _pip_would_install(beside_nova, wheel, requirement)
