# SPDX-License-Identifier: Apache-2.0
"""Run Nova's own unit tests with our classes in the place of its Flat and Qcow2.

    python tests/nova/stock_suite.py [--stock] [MODULE...]

--stock leaves Nova's own classes in place, to see what fails without us.

By Nova's own runner, unittest, because its tests cannot run under pytest. A
test that is listed below must fail, and for the reason given; the run fails
if it passes, or if another test fails.
"""

from __future__ import annotations

import json
import os
import sys
import unittest
import warnings

# Nova 27 to 33 would patch the whole interpreter for eventlet otherwise.
os.environ.setdefault("OS_NOVA_DISABLE_EVENTLET_PATCHING", "true")

# They assert the one fallocate of the virtual size, which is the bug.
EXPECTED_FAILURES = {
    "nova.tests.unit.virt.libvirt.test_imagebackend.FlatTestCase.test_prealloc_image",
    "nova.tests.unit.virt.libvirt.test_imagebackend.Qcow2TestCase.test_prealloc_image",
}


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
    failed = {test.id() for test, _ in (*result.failures, *result.errors)}
    expected = set() if stock else {name for name in EXPECTED_FAILURES if name.startswith(tuple(modules))}
    counts = {
        "run": result.testsRun,
        "skipped": len(result.skipped),
        "failed": len(failed),
        "unexpected_failures": sorted(failed - expected),
        "unexpected_successes": sorted(expected - failed),
    }
    print(json.dumps(counts))
    return int(bool(counts["unexpected_failures"] or counts["unexpected_successes"] or not result.testsRun))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
