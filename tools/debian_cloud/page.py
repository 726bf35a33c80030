# SPDX-License-Identifier: Apache-2.0
"""doc/source/cloud.rst, from what a run has seen."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import rst

_TITLE = """\
============================
A cloud of Debian's packages
============================

"""

# All in braces is read from the results.
_TEXT = """\
``tools/cloud`` has brought up a cloud of Debian {suite}'s own packages on one machine
({kernel}), as an operator has it, has booted a real guest in it with
python-openstackclient, and has written this page. imgprealloc was there both times;
what differs is ``compute_driver`` in ``/etc/nova/nova-compute.conf``, which Debian's
nova-compute reads after ``nova.conf``.

{steps}

The disks are those of a flavor with a root disk of 1 GiB (2 GiB after the resize) and an
ephemeral disk of 1 GiB, which the guest does not write; ``images_type`` is the default,
qcow2. The states are those that ``imgprealloc show`` tells Nova's user; the guest is that of
``tests/e2e``. In the last row the filesystem of ``instances_path`` is filled while the guest
starts. A MiB is taken only where there is something to give it back: ``heal_interval`` is 5.

What ran
========

{packages}

Each service is started as its systemd unit says, as the unit's user: nova-compute as
nova, with sudo, rootwrap and privsep for what needs root, QEMU as libvirt-qemu with
libvirt's own ``dynamic_ownership``. What is not as on an operator's machine:

* There is no systemd in a chroot. The units are read, and their commands run.
* QEMU emulates the guest's processor (``virt_type = qemu``), so that it runs where KVM is not
  to be had.
* Servers have no network (``--nic none``). Neutron's API is there, without agents, because
  Nova asks it for a server's ports all the same.
* libvirt's ``qemu.conf`` has ``security_driver = "none"``, ``namespaces = []`` and
  ``cgroup_controllers = []``: a chroot has neither AppArmor nor cgroups to give.
"""


def page(result: Mapping[str, Any]) -> str:
    """Make the page from the results of a run."""
    stock, ours = result["findings"]
    by_step = {found["step"]: found for found in stock["findings"]}
    rows = [(found["step"], _cell(by_step.get(found["step"])), _cell(found)) for found in ours["findings"]]
    return _TITLE + _TEXT.format(
        suite=result["suite"],
        kernel=f"Linux {result['kernel'].partition('-')[0]}",
        steps=_list_table(("step", f"``{stock['driver']}``", f"``{ours['driver']}``"), rows),
        packages=rst.table(("package", "version"), sorted(result["packages"].items())),
    )


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not tried"
    return found["said"] if found["good"] else f"**not as it should be:** {found['said']}"


def _list_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (head, *rows):
        lines += [f"   {'*' if not number else ' '} - {cell}" for number, cell in enumerate(row)]
    return "\n".join(lines)
