# SPDX-License-Identifier: Apache-2.0
"""A cloud of Debian's own packages, as an operator has it, and a server in it: with stock Nova's driver, and with ours.

tools/cloud runs this in a chroot with those packages (tools/in-chroot):

    configuration.py  the least that the services have to be told
    units.py          what systemd would do to start a service: there is no systemd in a chroot
    services.py       services that run, and how they are stopped
    client.py         python-openstackclient
    bringup.py        databases, users, endpoints, services, images, flavors: what an operator does once
    scenario.py       what an operator does with a server, and what becomes of its disks
    page.py           doc/source/cloud.rst
    __main__.py       the two commands: run, and page

Nothing of it is for this machine, and all that runs runs as the user that Debian
runs it as: nova-compute as nova, with sudo, rootwrap and privsep for what needs root,
QEMU as libvirt-qemu. The guest, its kernel and what it does are those of tests/e2e.
"""
