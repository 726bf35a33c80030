# SPDX-License-Identifier: Apache-2.0
"""Build this checkout's packages for distributions, from contrib/debian and contrib/rpm.

    python3 tools/packages.py deb|rpm FOLDER

FOLDER gets the package, whose path is the only line on standard output. By the
system's own Python, with its own pbr; the programs that are needed are not
installed here, see tools/build-deb and tools/build-rpm.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from email import utils
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

_REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
_MAINTAINER = "imgprealloc maintainers <maintainers@imgprealloc.invalid>"

# Nothing of the caller's: a virtual environment, or a Python that is not the system's.
_CLEAN = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent", "LC_ALL": "C.UTF-8"}


def main(arguments: Sequence[str]) -> int:
    """Build one package, and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=_KINDS)
    parser.add_argument("folder", type=pathlib.Path)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="imgprealloc-package-") as scratch:
        built = _KINDS[options.kind](pathlib.Path(scratch))
        target = options.folder.resolve() / built.name
        # Beside it first: somebody may be installing the one of before.
        shutil.copy(built, f"{target}.new")
        os.replace(f"{target}.new", target)
    print(target)
    return 0


def version() -> str:
    """Return this checkout's version, as pip has it.

    By pbr, which asks git; PBR_VERSION where there is none.
    """
    command = ["python3", "-c", "from pbr import packaging; print(packaging.get_version('imgprealloc'))"]
    named = {name: os.environ[name] for name in ("PBR_VERSION",) if name in os.environ}
    # Another user's checkout: git would not tell.
    trusted = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": str(_REPOSITORY)}
    return _output(command, **named, **trusted).split()[-1]


def _output(command: Sequence[str], **environment: str) -> str:
    done = subprocess.run(
        command, cwd=_REPOSITORY, env={**_CLEAN, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def copy_sources(target: pathlib.Path) -> None:
    """Copy what belongs to this checkout: all that git has, or would take; without git, all."""
    try:
        listed = _output(
            [
                "git",
                "-c",
                f"safe.directory={_REPOSITORY}",
                "ls-files",
                "-z",
                "--cached",
                "--others",
                "--exclude-standard",
            ]
        )
    except subprocess.CalledProcessError:
        shutil.copytree(_REPOSITORY, target, ignore=shutil.ignore_patterns(".venv", ".tox", "build", "*.egg-info"))
        return
    for name in filter(None, listed.split("\0")):
        # What has been removed, and is not committed.
        if os.path.lexists(_REPOSITORY / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_REPOSITORY / name, target / name, follow_symlinks=False)


def _time() -> int:
    """Return when this was committed, so that the same commit makes the same package."""
    try:
        return int(_output(["git", "-c", f"safe.directory={_REPOSITORY}", "log", "-1", "--format=%ct"]))
    except subprocess.CalledProcessError:
        return int(time.time())


def _deb(scratch: pathlib.Path) -> pathlib.Path:
    source = scratch / "imgprealloc"
    copy_sources(source)
    shutil.copytree(source / "contrib" / "debian", source / "debian")
    # As pbr itself does it: a development version comes before the release.
    numbers, dev, number = version().partition(".dev")
    (source / "debian" / "changelog").write_text(
        f"imgprealloc ({numbers}{dev.replace('.', '~')}{number}) unstable; urgency=medium\n\n"
        "  * Built from a checkout; what is new in it is in releasenotes/notes.\n\n"
        f" -- {_MAINTAINER}  {utils.formatdate(_time())}\n"
    )
    _run(["dpkg-buildpackage", "--build=binary", "--no-sign"], source)
    [built] = scratch.glob("*.deb")
    return built


def _rpm(scratch: pathlib.Path) -> pathlib.Path:
    numbers = version()
    name = f"imgprealloc-{numbers}"
    copy_sources(scratch / name)
    (scratch / "SOURCES").mkdir()
    _run(["tar", "--create", "--gzip", f"--file=SOURCES/{name}.tar.gz", name], scratch)
    spec = scratch / name / "contrib" / "rpm" / "imgprealloc.spec"
    command = ["rpmbuild", "-bb", "--define", f"_topdir {scratch}", "--define", f"upstream_version {numbers}"]
    if not pathlib.Path("/etc/redhat-release").exists():
        # What the spec needs is there under other names, and such systems' macros are not.
        command += ["--nodeps", "--define", "python3_sitelib /usr/lib/python3/site-packages"]
    _run([*command, str(spec)], scratch)
    [built] = (scratch / "RPMS").rglob("*.rpm")
    return built


_KINDS = {"deb": _deb, "rpm": _rpm}


def _run(command: Sequence[str], folder: pathlib.Path) -> None:
    """Run a program; what it prints is shown only if it fails."""
    environment = {**_CLEAN, "SOURCE_DATE_EPOCH": str(_time())}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{done.stdout}tools/packages.py: {command[0]} failed with status {done.returncode}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
