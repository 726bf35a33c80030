# SPDX-License-Identifier: Apache-2.0
"""Bring the cloud up and go through the scenario; or write the page.

    python3 -m debian_cloud run --suite NAME --json FILE

is for the chroot.

    python3 -m debian_cloud page FILE
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import logging
import pathlib
import platform
import shutil
import sys
import time

from e2e import guest_image

from debian_cloud import bringup
from debian_cloud import page
from debian_cloud import scenario
from debian_cloud import services

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
_PAGE = _REPOSITORY / "doc" / "source" / "cloud.rst"

# Whose versions the page tells.
_PACKAGES = (
    "nova-compute", "nova-api", "placement-api", "keystone", "glance-api", "neutron-api", "mariadb-server",
    "rabbitmq-server", "libvirt-daemon-system", "qemu-system-x86", "qemu-utils", "python3-openstackclient",
)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Do one of the two; 0 if all was as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("run")
    verb.add_argument("--suite", required=True)
    verb.add_argument("--json", required=True, type=pathlib.Path)
    verb.set_defaults(do=_run)
    verb = verbs.add_parser("page")
    verb.add_argument("file", type=pathlib.Path)
    verb.set_defaults(do=_page)
    options = parser.parse_args(arguments)
    return int(not options.do(options))


def _run(options: argparse.Namespace) -> bool:
    services.LOGS.mkdir()
    # Debian's uwsgi hangs up after an answer without content; the SDK tells of each time, and asks again.
    logging.basicConfig(filename=services.LOGS / "sdk.log")
    try:
        results = _results()
    finally:
        shutil.copytree(services.LOGS.parent, options.json.with_suffix(".logs"), dirs_exist_ok=True)
    result = {
        "suite": options.suite,
        "kernel": platform.release(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "findings": [
            {"driver": driver, "findings": [dataclasses.asdict(finding) for finding in found]}
            for driver, found in results.items()
        ],
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    return all(finding.good for found in results.values() for finding in found)


def _results() -> dict[str, list[scenario.Finding]]:
    guest = guest_image.build(pathlib.Path("/var/tmp"))
    results: dict[str, list[scenario.Finding]] = {}
    with contextlib.ExitStack() as stack:
        bringup.install(_REPOSITORY)
        bringup.configure()
        bringup.infrastructure(stack)
        bringup.control_plane(stack)
        for driver in (scenario.STOCK, scenario.OURS):
            with bringup.compute(driver):
                if not results:
                    bringup.offer(guest)
                found = results.setdefault(driver, [])
                for finding in scenario.findings(driver):
                    _say(f"{driver}: {finding.step}: {finding.said}{'' if finding.good else ' (NOT GOOD)'}")
                    found.append(finding)
    return results


def _version(package: str) -> str:
    return services.run("dpkg-query", "--show", "--showformat=${Version}", package)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _page(options: argparse.Namespace) -> bool:
    _PAGE.write_text(page.page(json.loads(options.file.read_text())))
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
