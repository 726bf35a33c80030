# SPDX-License-Identifier: Apache-2.0
"""Filesystems, by what they have and can do: marks that give a test one after another as its fixture "kind"."""

import loop_filesystem
import pytest

common = pytest.mark.parametrize("kind", loop_filesystem.COMMON)
with_attributes = pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
with_fallocate = pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
without_fallocate = pytest.mark.parametrize("kind", ["ext2"])
# Where cp shares extents, and fallocate takes them apart again.
with_reflinks = pytest.mark.parametrize("kind", ["xfs"])
copying_on_write = pytest.mark.parametrize("kind", ["btrfs"])
