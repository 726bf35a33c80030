# SPDX-License-Identifier: Apache-2.0
"""The library with real qemu-img on real filesystems."""
