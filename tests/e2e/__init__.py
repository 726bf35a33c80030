# SPDX-License-Identifier: Apache-2.0
"""Nova's own API boots a real guest, on the real libvirt and QEMU, and the guest writes every byte of its disks.

    tox -e e2e                                    all of it, by tox
    python -m pytest tests/e2e                    the same, in an environment with Nova
    python -m pytest tests/e2e -k hard_reboot     one scenario
    IMGPREALLOC_E2E_VIRT_TYPE=kvm tox -e e2e      in KVM, which is ten times faster where guests run in it

Needs root, what bindep.txt lists for its profile "e2e" and, beside Nova, what
requirements.txt here and in tests/nova list. It is the installed imgprealloc
that is tested, so install it again after a change; tox does. Neither a running
libvirt nor systemd is needed, and one that runs is left alone: isolation.py
gives each test a mount and a process namespace, in which libvirt_daemons.py
starts daemons of its own, and which takes everything with it when it ends.
Without KVM a scenario takes half a minute, or two on a busy machine.

    guest_image.py      what the guest boots from, built of Debian's kernel and busybox
    whole_disk.c        what the guest does to its disks
    libvirt_daemons.py  virtlogd and libvirtd
    cloud.py            Nova in this process
    server.py           a server in it, by Nova's API, by libvirt, and by its console
    isolation.py        a namespace for each test, and a limit to its time
"""
