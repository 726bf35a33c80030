# SPDX-License-Identifier: Apache-2.0
"""The options in nova.conf's [imgprealloc], and how a Preallocator is made from them."""

from __future__ import annotations

from collections.abc import Iterable

from oslo_config import cfg

from imgprealloc import preallocator

GROUP = cfg.OptGroup("imgprealloc", title="Preallocation of instance disks")

# A flavor's own mode.
MODE_EXTRA_SPEC = "imgprealloc:mode"

OPTIONS = (
    cfg.StrOpt(
        "mode",
        default="falloc",
        choices=[
            ("falloc", "Map all clusters and set all space aside, without writing it. Takes seconds."),
            ("full", "Map all clusters and write zeros to all space. Takes as long as writing the disk once; guests "
             "write fastest afterwards, most of all on XFS."),
            ("metadata", "Map all clusters and set nothing aside: the host can still run out of space."),
        ],
        help="""
How instance disks are preallocated, in the words of qemu-img.

Takes effect where ``preallocate_images`` in ``[DEFAULT]`` is ``space``. A
flavor may choose its own mode with the extra spec ``imgprealloc:mode``.
""",
    ),
    cfg.StrOpt(
        "on_unsupported",
        default="metadata",
        choices=[
            ("metadata", "Map all clusters, set nothing aside, and log a warning."),
            ("full", "Write zeros instead."),
            ("error", "Refuse to build the instance, so that another host is tried."),
        ],
        help="""
What to do in mode ``falloc`` on a filesystem that cannot set space aside.

Among these are NFS before 4.2, ext2, ext3, and ZFS.
""",
    ),
    cfg.StrOpt(
        "existing_disks",
        default="reserve",
        choices=[
            ("reserve", "Set aside the space that the disk may grow to, and leave the file as it is."),
            ("rewrite", "Copy the disk into a preallocated one when its instance is started. Needs space for both, "
             "and the start waits for the copy."),
        ],
        help="""
What to do with disks that have data in them and are not preallocated.

These are the disks of instances that are older than this setting, and those
that came from a host without it. Their content is never changed.
""",
    ),
    cfg.BoolOpt(
        "protect_from_discard",
        default=True,
        help="""
Keep guests from giving preallocated space back.

With ``hw_disk_discard = unmap`` in ``[libvirt]`` a TRIM in the guest would free
the space again. When this is true, disks whose space is held ignore it.
""",
    ),
    cfg.IntOpt(
        "overlay_cluster_size",
        default=preallocator.OVERLAY_CLUSTER_SIZE,
        choices=[16 * 1024 << shift for shift in range(8)],
        help="""
Cluster size, in bytes, of the overlays that are made.

A cluster has 32 subclusters, so that the default of 128 KiB lets a guest
write 4 KiB without copying anything from the base image. Smaller clusters
need more metadata; larger ones copy when a guest writes 4 KiB.
""",
    ),
)  # fmt: skip


def register(conf: cfg.ConfigOpts) -> None:
    """Make conf.imgprealloc known; harmless if it is already."""
    conf.register_group(GROUP)
    conf.register_opts(OPTIONS, group=GROUP)


def list_opts() -> Iterable[tuple[cfg.OptGroup, Iterable[cfg.Opt]]]:
    """Tell oslo-config-generator about the options."""
    return [(GROUP, OPTIONS)]


def validate(conf: cfg.ConfigOpts) -> None:
    """Read every option now, so that a wrong one is told when a service starts and not when it builds.

    :raises: oslo_config.cfg.ConfigFileValueError
    """
    for option in OPTIONS:
        getattr(conf.imgprealloc, option.dest)


def preallocator_from(conf: cfg.ConfigOpts, mode: str | None = None) -> preallocator.Preallocator:
    """Return the Preallocator that conf.imgprealloc describes.

    :param mode: instead of the configured one
    """
    group = conf.imgprealloc
    return preallocator.Preallocator(
        mode or group.mode,
        on_unsupported=group.on_unsupported,
        overlay_cluster_size=group.overlay_cluster_size,
    )
