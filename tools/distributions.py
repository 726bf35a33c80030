# SPDX-License-Identifier: Apache-2.0
"""Try our package with a distribution's own Nova, add up what was found, and write doc/source/distributions.rst.

    python3 tools/distributions.py run --suite NAME --package DEB --json FILE [-- pytest's arguments]
    python3 tools/distributions.py sum [--page] FILE...

run installs the package, configures Nova, starts it, and removes the package:
only for a chroot that is thrown away, in which Nova is installed and has not
been touched; by the distribution's Python, as root. FILE is what run writes; for
sum, one that is missing counts as a failure. The page is not written then. The last
line that sum prints has the sums.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import junit
import rst

_REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_REPOSITORY / "tests" / "nova"))
import release  # noqa: E402

_PAGE = _REPOSITORY / "doc" / "source" / "distributions.rst"
# But for how pip installs us, which is of another place, and for what mfusepy breaks, which Debian does not have.
_LEFT_OUT = ("test_packaging.py", "test_failed_looks.py")
_EVERYTHING = ["tests/nova", *(f"--ignore=tests/nova/{name}" for name in _LEFT_OUT)]

_OURS = "imgprealloc.LibvirtDriver"
_STOCK = "libvirt.LibvirtDriver"
_NAME = "imgprealloc"
_ETC = pathlib.Path("/etc/nova")
_CONF = _ETC / "nova.conf"
_COMPUTE_CONF = _ETC / "nova-compute.conf"
_DROP_IN = _ETC / "nova-compute.conf.d" / "preallocation.conf"
_LOG = pathlib.Path("/var/log/nova/nova-compute.log")
_SCRIPT = "/etc/init.d/nova-compute"
_AS_NOVA = ["setpriv", "--reuid=nova", "--regid=nova", "--init-groups"]
# Seconds for a nova-compute to come as far as it can without a message queue.
_PATIENCE = 180

# What nova-compute does before it has one to talk to, and the driver that it would load then.
_LOAD = """
import sys
sys.argv = sys.argv[1:]
import nova.cmd.compute
from nova import config, objects
from nova.virt import driver
config.parse_args(sys.argv)
objects.register_all()
print(type(driver.load_compute_driver(None)).__module__)
"""
_LOADS_OURS = "imgprealloc.nova"
_LOADS_STOCK = "nova.virt.libvirt.driver"

_TITLE = """\
=============
Distributions
=============

"""

# All in braces is read from the results.
_TEXT = """\
``tools/test-distro`` has built the Debian package (``tools/build-deb``), has installed it by
apt beside these distributions' own Nova, each in a chroot, and has written this page.
Nova, Python and all libraries are the distribution's; the kernel was {kernels}.

{versions}

"Passed", "failed" and "skipped" are tests of ``tests/nova/``, all or some of them, by the
distribution's pytest, on the package that was installed. ``test_packaging.py``, which is of
pip, and ``test_failed_looks.py``, which needs mfusepy, are never among them.

What was done, with ``nova-compute`` as its service starts it, and it and the command as
user nova:

{steps}
{skips}"""


class Failed(Exception):
    """What was tried has not come out as it should."""


def main(arguments: Sequence[str]) -> int:
    """Do one of the two; 0 if all there is has been tried, and is good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("run")
    verb.add_argument("--suite", required=True, metavar="NAME")
    verb.add_argument("--package", required=True, metavar="DEB")
    verb.add_argument("--json", required=True, metavar="FILE")
    verb.set_defaults(do=_run)
    verb = verbs.add_parser("sum")
    verb.add_argument("--page", action="store_true")
    verb.add_argument("files", nargs="+", metavar="FILE")
    verb.set_defaults(do=_sum)
    # Not by argparse, which takes -- differently from one Python to the next.
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:end])
    options.tests = list(arguments[end + 1 :]) or _EVERYTHING
    return int(not options.do(options))


def _run(options: argparse.Namespace) -> bool:
    trial = _Trial(options.package)
    steps = dict(map(_outcome, trial.before()))
    tests = _tests(options.tests)
    steps.update(map(_outcome, trial.after()))
    result = {
        "suite": options.suite,
        "versions": {name: _version(name) for name in ("python3-nova", "qemu-utils", "libvirt0")},
        "python": platform.python_version(),
        "kernel": platform.release(),
        "tests": options.tests,
        "steps": steps,
        **tests,
    }
    result["good"] = result["good"] and not any(steps.values())
    pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return bool(result["good"])


def _outcome(step: Callable[[], None]) -> tuple[str, str]:
    """Do a step; return what it is, and what is wrong, or nothing."""
    title = " ".join((step.__doc__ or "").split())
    print(f"tools/distributions.py: {title}", flush=True)
    try:
        step()
    except Failed as exc:
        print(f"tools/distributions.py: FAILED: {exc}", flush=True)
        return title, str(exc)
    return title, ""


def _tests(arguments: Sequence[str]) -> dict[str, Any]:
    """Run pytest; not as python -m, which would take the modules from here and not from the package."""
    with tempfile.TemporaryDirectory(prefix="imgprealloc-distribution-") as scratch:
        report = pathlib.Path(scratch, "report.xml")
        command = ["pytest-3", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        environment = {
            **os.environ,
            # As its nova-compute runs; the last one where it can run in both.
            "OS_NOVA_DISABLE_EVENTLET_PATCHING": release.THREADING[release.modes()[-1]],
            "PYTHONWARNINGS": "ignore",
            # For our plugin, which a pytest before 8.4 looks for before it has read pyproject.toml.
            "PYTHONPATH": str(_REPOSITORY / "tests"),
        }
        done = subprocess.run(command, cwd=_REPOSITORY, env=environment, check=False)
        counts = junit.counted(report.read_text() if report.exists() else "<testsuites/>")
    return {**counts, "good": done.returncode == 0}


class _Trial:
    """What is done with the package, step by step; a step's docstring is what the page says of it.

    :param package: the Debian package
    """

    def __init__(self, package: str) -> None:
        self._package = package
        self._before = _state_of_nova()

    def before(self) -> Iterator[Callable[[], None]]:
        """What comes before the tests."""
        yield self.install
        yield self.driver_in_nova_conf
        yield self.driver_in_a_drop_in
        yield self.driver_where_it_counts
        yield self.running

    def after(self) -> Iterator[Callable[[], None]]:
        """What comes after them."""
        yield self.remove

    def install(self) -> None:
        """``apt install`` of the package: no file of Nova's packages is changed, and nothing is enabled"""
        _do("apt-get", "install", "-y", "--no-install-recommends", self._package)
        _same("Nova's files", _state_of_nova(), self._before)
        _same("enabled units", _enabled(), [])
        _same("check-nova's status", _check_nova()[0], 1)

    def driver_in_nova_conf(self) -> None:
        """the driver is set in ``nova.conf``, where ``nova-compute.conf`` sets Nova's own: ``nova-compute`` loads
        Nova's, ``check-nova`` says so, and names that file"""
        _set(_CONF, compute_driver=_OURS, preallocate_images="space")
        _same("the driver that is loaded", _loaded(), _LOADS_STOCK)
        status, rows = _check_nova()
        _same("check-nova's status", status, 1)
        _has("check-nova", rows["compute_driver"], f"by {_COMPUTE_CONF}")

    def driver_in_a_drop_in(self) -> None:
        """it is set in ``nova-compute.conf.d/`` instead: the same"""
        _DROP_IN.parent.mkdir(exist_ok=True)
        _DROP_IN.write_text(f"[DEFAULT]\ncompute_driver = {_OURS}\n")
        _same("the driver that is loaded", _loaded(), _LOADS_STOCK)
        status, rows = _check_nova()
        _same("check-nova's status", status, 1)
        _has("check-nova", rows["configuration"], str(_DROP_IN))
        shutil.rmtree(_DROP_IN.parent)

    def driver_where_it_counts(self) -> None:
        """it is set in ``nova-compute.conf``: ``nova-compute`` loads ours, and ``check-nova`` says that instances
        will be preallocated"""
        _set(_COMPUTE_CONF, compute_driver=_OURS)
        _same("the driver that is loaded", _loaded(), _LOADS_OURS)
        status, rows = _check_nova()
        _same("check-nova's status", status, 0)
        _has("check-nova", rows["configuration"], f"{_CONF}, {_COMPUTE_CONF}")

    def running(self) -> None:
        """while that ``nova-compute`` runs, ``check-nova`` reads the same files by its process"""
        with _nova_compute():
            status, rows = _check_nova()
        _same("check-nova's status", status, 0)
        _has("check-nova", rows["nova-compute"], "process ")
        _has("check-nova", rows["configuration"], f"{_CONF}, {_COMPUTE_CONF}")

    def remove(self) -> None:
        """the driver is set back, ``apt remove`` and ``apt purge`` of the package: nothing of it is left, Nova's files
        are as they were, and ``nova-compute`` loads its own driver"""
        _set(_COMPUTE_CONF, compute_driver=_STOCK)
        listed = map(os.path.normpath, _do("dpkg-query", "--listfiles", _NAME).splitlines())
        files = [file for file in listed if not _is_shared(file)]
        for verb in ("remove", "purge"):
            _do("apt-get", verb, "-y", _NAME)
            _same(f"what {verb} leaves", [file for file in files if os.path.lexists(file)], [])
        _same("what is left of it in Nova", [str(path) for path in _modules_of_nova() if _NAME in path.name], [])
        _same("the driver that is loaded", _loaded(), _LOADS_STOCK)


def _same(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise Failed(f"{what}: {found!r}, and not {wanted!r}")


def _has(what: str, found: str, wanted: str) -> None:
    if wanted not in found:
        raise Failed(f"{what}: {found!r}, without {wanted!r}")


def _do(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: {done.stdout}")
    return done.stdout


def _state_of_nova() -> dict[str, str]:
    """Return what dpkg finds changed in Nova's packages, and the sums of its configuration."""
    packages = _do("dpkg-query", "--show", "--showformat=${source:Package} ${Package}\n").splitlines()
    names = [line.split()[1] for line in packages if line.split()[0] == "nova"]
    sums = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in _ETC.rglob("*") if path.is_file()}
    verified = subprocess.run(["dpkg", "--verify", *names], stdout=subprocess.PIPE, text=True, check=False).stdout
    return {**sums, "dpkg --verify": verified}


def _enabled() -> list[str]:
    return [str(path) for path in pathlib.Path("/etc/systemd/system").rglob(f"*{_NAME}*")]


def _is_shared(path: str) -> bool:
    """Whether other packages have a folder, too."""
    return path == "/" or "," in _do("dpkg-query", "--search", path)


def _modules_of_nova() -> Iterator[pathlib.Path]:
    return pathlib.Path("/usr/lib/python3/dist-packages/nova").rglob("*")


def _set(path: pathlib.Path, **options: str) -> None:
    """Set options in [DEFAULT] as an operator does it, in the line that has one, or after the section's head."""
    text = path.read_text()
    for name, value in options.items():
        line = f"{name} = {value}"
        text, count = re.subn(rf"^{name}\s*=.*$", line, text, count=1, flags=re.MULTILINE)
        if not count:
            text = re.sub(r"^\[DEFAULT\]$", f"[DEFAULT]\n{line}", text, count=1, flags=re.MULTILINE)
        if line not in text:
            raise Failed(f"{path} has no [DEFAULT]")
    path.write_text(text)


def _loaded() -> str:
    """Load the driver as the service does, by the same words; return where it comes from."""
    words = _do(*_AS_NOVA, _SCRIPT, "show-args").split()
    return _do(*_AS_NOVA, "python3", "-W", "ignore", "-c", _LOAD, *words).splitlines()[-1]


@contextlib.contextmanager
def _nova_compute() -> Iterator[None]:
    """Run nova-compute as its service does, with its configuration read; it gets no further without a message queue.

    :raises: Failed for one that has ended, or does not come as far
    """
    # As systemd makes them for it.
    for folder in ("/run/nova", "/run/lock/nova"):
        os.makedirs(folder, exist_ok=True)
        shutil.chown(folder, "nova", "nova")
    _LOG.unlink(missing_ok=True)
    process = subprocess.Popen([*_AS_NOVA, _SCRIPT, "systemd-start"], cwd="/var/lib/nova", stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + _PATIENCE
        log = ""
        while "impl_rabbit" not in log:
            if process.poll() is not None or time.monotonic() > until:
                raise Failed(f"nova-compute has not come as far as its message queue: {log[-2000:]}")
            time.sleep(0.2)
            log = _LOG.read_text() if _LOG.exists() else ""
        yield
    finally:
        process.kill()
        process.wait()


def _check_nova() -> tuple[int, dict[str, str]]:
    """Return check-nova's exit status, and what it says of each subject."""
    command = [*_AS_NOVA, "imgprealloc", "check-nova", "-f", "json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    rows = json.loads(done.stdout) if done.stdout else []
    return done.returncode, {row["subject"]: row["detail"] for row in rows}


def _version(package: str) -> str:
    return _do("dpkg-query", "--show", "--showformat=${Version}", package)


def _sum(options: argparse.Namespace) -> bool:
    results = [json.loads(pathlib.Path(name).read_text()) for name in options.files if os.path.exists(name)]
    missing = len(options.files) - len(results)
    if options.page and not missing:
        _PAGE.write_text(page(results))
    sums = dict.fromkeys(junit.OUTCOMES, 0)
    sums["failed"] = missing
    for result in results:
        told = ", ".join(f"{number} {word}" for word, number in _counts(result).items())
        print(f"{result['suite']}, Nova {result['versions']['python3-nova']}: {told}")
        for what, message in [*result["steps"].items(), *result["failures"].items()]:
            if message:
                print(f"    {what}: {message}")
        for word, number in _counts(result).items():
            sums[word] += number
    print("distributions: " + ", ".join(f"{number} {word}" for word, number in sums.items()))
    return not sums["failed"] and all(result["good"] for result in results)


def _counts(result: dict[str, Any]) -> dict[str, int]:
    """Count the tests, and each step that failed as one."""
    counts = {word: sum(file[word] for file in result["files"].values()) for word in junit.OUTCOMES}
    counts["failed"] += sum(map(bool, result["steps"].values()))
    # A run that ended early has no number of its own.
    counts["failed"] = counts["failed"] or int(not result["good"])
    return counts


def page(results: Sequence[dict[str, Any]]) -> str:
    """Make the page from the results of all distributions."""
    steps = dict.fromkeys(step for result in results for step in result["steps"])
    return _TITLE + _TEXT.format(
        kernels=" or ".join(sorted({f"Linux {result['kernel'].partition('-')[0]}" for result in results})),
        versions=rst.table(
            ("Debian", "Nova", "Python", "QEMU", "libvirt", "tests", "passed", "failed", "skipped"),
            [*map(_row, results)],
        ),
        steps="\n".join(_step(step, results) for step in steps),
        skips="".join(f"\n* skipped in {result['suite']}: {why}\n" for result in results for why in result["skips"]),
    )


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    versions = result["versions"].values()
    nova, *others = versions
    tests = "all" if result["tests"] == _EVERYTHING else "some"
    return result["suite"], nova, result["python"], *others, tests, *map(str, _counts(result).values())


def _step(step: str, results: Sequence[dict[str, Any]]) -> str:
    failed = [result["suite"] for result in results if result["steps"].get(step, "was not done")]
    return f"* {step}" + (f" (FAILED in {', '.join(failed)})" if failed else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
