# SPDX-License-Identifier: Apache-2.0
"""Run Nova's own unit tests with our classes in the place of its Flat and Qcow2.

    python tests/nova/stock_suite.py [--stock] [MODULE...]

--stock leaves Nova's own classes in place, to see what fails without us.

By Nova's own runner, unittest, because its tests cannot run under pytest. A
test that is listed below must fail, and for the reason given; the run fails
if it passes, or if another test fails.
"""

from __future__ import annotations

from importlib import metadata
import json
import os
import sys
from typing import Any
import unittest
import warnings

# Nova 27 to 33 would patch the whole interpreter for eventlet otherwise.
os.environ.setdefault("OS_NOVA_DISABLE_EVENTLET_PATCHING", "true")

# oslotest, which Nova's tests stand on, ends a test after so many seconds, and it fails.
os.environ.setdefault("OS_TEST_TIMEOUT", "120")

_DRIVER_TESTS = "nova.tests.unit.virt.libvirt.test_driver."
_BACKEND_TESTS = "nova.tests.unit.virt.libvirt.test_imagebackend."

_ASSERTS_THE_BUG = "asserts the one fallocate of the virtual size, which is the bug"
_WAITS_FOR_EVENTLET = "waits for eventlet, for ever on Nova 33's native threads; on Nova's own classes, too"

# What must fail on our classes, in every release, and why.
EXPECTED_FAILURES = {
    f"{_BACKEND_TESTS}FlatTestCase.test_prealloc_image": _ASSERTS_THE_BUG,
    f"{_BACKEND_TESTS}Qcow2TestCase.test_prealloc_image": _ASSERTS_THE_BUG,
}

# What must fail on Nova's own classes, too, by release and mode, and why.
EXPECTED_WITHOUT_US = {
    ("33", "threads"): {
        f"{_DRIVER_TESTS}CacheConcurrencyTestCase.test_different_fname_concurrency": _WAITS_FOR_EVENTLET,
        f"{_DRIVER_TESTS}CacheConcurrencyTestCase.test_same_fname_concurrency": _WAITS_FOR_EVENTLET,
    },
}


def expected_failures(release: str, mode: str, *, stock: bool) -> dict[str, str]:
    """Return the tests that must fail, with the reasons.

    :param release: Nova's, such as "34"
    :param mode: "eventlet" or "threads"
    :param stock: whether on Nova's own classes
    """
    return {**({} if stock else EXPECTED_FAILURES), **EXPECTED_WITHOUT_US.get((release, mode), {})}


# All that has to do with disks.
DISK_TESTS = [
    "nova.tests.unit.virt.libvirt.test_imagebackend",
    "nova.tests.unit.virt.libvirt.test_utils",
    "nova.tests.unit.virt.libvirt.test_driver",
    "nova.tests.unit.virt.libvirt.test_imagecache",
    "nova.tests.unit.virt.disk.test_api",
    "nova.tests.unit.virt.disk.test_inject",
    "nova.tests.unit.virt.test_images",
]


def substitute() -> None:
    """Put our classes where Nova's modules, and its tests, look for Nova's."""
    from nova.virt.libvirt import imagebackend
    from oslo_config import cfg

    import imgprealloc.nova

    imgprealloc.opts.register(cfg.CONF)
    imagebackend.Flat = imgprealloc.nova.Flat
    imagebackend.Qcow2 = imgprealloc.nova.Qcow2


def judge(result: unittest.TestResult, expected: dict[str, str]) -> dict[str, Any]:
    """Count the outcomes, and name those that are not as expected.

    :param expected: names of tests that must fail, with the reasons
    """
    failed = {test.id() for test, _ in (*result.failures, *result.errors)}
    # Nova marks some of its own; one that passes is a failure in its runner, too.
    failed |= {test.id() for test in result.unexpectedSuccesses}
    skipped = len(result.skipped) + len(result.expectedFailures)
    return {
        "passed": result.testsRun - len(failed) - skipped,
        "skipped": skipped,
        "skip_reasons": sorted({reason for _, reason in result.skipped}),
        "failed": len(failed - set(expected)),
        "expected_failures": {name: expected[name] for name in sorted(failed & set(expected))},
        "unexpected_failures": sorted(failed - set(expected)),
        "unexpected_successes": sorted(set(expected) - failed),
    }


def is_good(counts: dict[str, Any]) -> bool:
    """Whether tests passed, and only those failed that must."""
    return bool(counts["passed"]) and not counts["unexpected_failures"] and not counts["unexpected_successes"]


def main(arguments: list[str]) -> int:
    """Run the modules' tests; print what was unexpected, and a line of JSON with the counts."""
    stock = "--stock" in arguments
    modules = [name for name in arguments if name != "--stock"] or DISK_TESTS
    warnings.simplefilter("ignore")
    import nova.tests.unit  # noqa: F401  (first of all: it settles eventlet or threads)

    if not stock:
        substitute()
    suite = unittest.defaultTestLoader.loadTestsFromNames(modules)
    result = unittest.TextTestRunner(verbosity=0, warnings="ignore").run(suite)
    release = metadata.version("nova").split(".")[0]
    mode = "eventlet" if os.environ["OS_NOVA_DISABLE_EVENTLET_PATCHING"] == "false" else "threads"
    known = expected_failures(release, mode, stock=stock)
    counts = judge(result, {name: reason for name, reason in known.items() if name.startswith(tuple(modules))})
    print(json.dumps(counts))
    return int(not is_good(counts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
