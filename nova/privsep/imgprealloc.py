# SPDX-License-Identifier: Apache-2.0
"""What imgprealloc needs root for: filling the holes of a running guest's disk, which belongs to libvirt's user.

Nova's privsep daemon calls functions of the package nova alone; this file is
installed into its nova.privsep package.
"""

from imgprealloc import fallocate
import nova.privsep


@nova.privsep.sys_admin_pctxt.entrypoint
def fill(path: str, device: int, inode: int, start: int, length: int) -> None:
    """Set aside space for the holes in a stretch of a file; neither its content nor its length changes.

    :param device: st_dev of the file that is meant
    :param inode: its st_ino
    :raises: OSError, with ESTALE for another file
    """
    fallocate.fill_named(path, device, inode, start, length)
