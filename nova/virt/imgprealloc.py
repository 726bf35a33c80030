# SPDX-License-Identifier: Apache-2.0
"""So that compute_driver = imgprealloc.LibvirtDriver finds the driver.

Nova imports nova.virt.<compute_driver>; this file is installed into its
nova.virt package. All that it does is in imgprealloc.nova.
"""

from imgprealloc.nova import LibvirtDriver

__all__ = ("LibvirtDriver",)
