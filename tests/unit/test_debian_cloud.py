# SPDX-License-Identifier: Apache-2.0
"""What is read of systemd's units for the cloud of packages, what its services are told, and the page of a run."""

from __future__ import annotations

from typing import Any

from debian_cloud import configuration
from debian_cloud import page
from debian_cloud import scenario
from debian_cloud import units

_UNIT = """
[Unit]
Description=OpenStack Nova Compute (nova-compute)
ExecStart=/not/of/this/section

[Service]
User=nova
Group=nova
WorkingDirectory=/var/lib/nova
RuntimeDirectory=nova nova/more
Environment=ONE=1 "TWO=2 and a half"
Environment=THREE=3
# ExecStart=/not/a/comment
ExecStartPre=-/bin/mkdir -p \\
    /var/lock/nova
ExecStartPre=+/bin/true
ExecStart=/etc/init.d/nova-compute systemd-start $MORE ${OTHERS}
Restart=always
"""

_FINDINGS = [{"step": "its disks", "said": "disk: thin", "good": True}]


def test_unit_says_how_and_as_whom_its_service_is_started() -> None:
    unit = units.parsed(_UNIT)

    assert unit.command == ("/etc/init.d/nova-compute", "systemd-start")
    assert unit.before == (("/bin/mkdir", "-p", "/var/lock/nova"), ("/bin/true",))
    assert (unit.user, unit.group, unit.folder) == ("nova", "nova", "/var/lib/nova")
    assert unit.runtime == ("nova", "nova/more")
    assert unit.environment == {"ONE": "1", "TWO": "2 and a half", "THREE": "3"}


def test_unit_without_a_user_is_started_as_root() -> None:
    unit = units.parsed("[Service]\nExecStart=/usr/sbin/libvirtd\n")

    assert (unit.user, unit.folder) == ("root", "/")


def test_options_of_no_section_come_without_a_head() -> None:
    assert configuration.text({"": {"namespaces": "[]"}}) == "namespaces = []\n"
    assert configuration.text({"DEFAULT": {"my_ip": "127.0.0.1"}, "vnc": {"enabled": "false"}}) == (
        "[DEFAULT]\nmy_ip = 127.0.0.1\n[vnc]\nenabled = false\n"
    )


def test_drivers_differ_in_nothing_but_themselves() -> None:
    stock, ours = (configuration.nova_compute(driver) for driver in (scenario.STOCK, scenario.OURS))

    assert stock["DEFAULT"] == {"compute_driver": "libvirt.LibvirtDriver"}
    assert ours == {**stock, "DEFAULT": {"compute_driver": "imgprealloc.LibvirtDriver"}}


def test_page_has_both_drivers_side_by_side_and_says_what_is_wrong() -> None:
    result: dict[str, Any] = {
        "suite": "trixie",
        "kernel": "6.18.1-amd64",
        "packages": {"nova-compute": "2:31.0.0-1"},
        "findings": [
            {"driver": scenario.STOCK, "findings": _FINDINGS},
            {
                "driver": scenario.OURS,
                "findings": [
                    {"step": "its disks", "said": "disk: mapped", "good": False},
                    {"step": "a hole", "said": "filled", "good": True},
                ],
            },
        ],
    }

    lines = page.page(result).splitlines()

    row = lines.index("   * - its disks")
    assert lines[row + 1 : row + 6] == [
        "     - disk: thin",
        "     - **not as it should be:** disk: mapped",
        "   * - a hole",
        "     - not tried",
        "     - filled",
    ]
    assert any(line.split() == ["nova-compute", "2:31.0.0-1"] for line in lines)
