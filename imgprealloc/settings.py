# SPDX-License-Identifier: Apache-2.0
"""The settings of preallocation: each stands here once, and reaches the library, nova.conf and the command.

A new one is a field of Settings, with its help. What Nova alone asks for is in
opts.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal, Optional, Union

from oslo_utils import units

from imgprealloc import sizes

Mode = Literal["falloc", "full", "metadata"]
OnUnsupported = Literal["metadata", "full", "error"]
OverlaySubclusters = Literal["unallocated", "allocated", "copied"]
KeepFree = Union[int, str]

# KiB; qcow2 has no smaller clusters with subclusters, and no larger ones.
_CLUSTER_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)


def described(
    choices: Optional[Mapping[Any, str]], help: str, *, by_flavor: bool = False, for_existing: Any = None
) -> dict[str, Any]:
    """Say of a setting what it does.

    :param choices: all the values that it may have, and what each does; None for
        a part of a filesystem, as sizes.part() has it
    :param help: for the operator; its first line is also the command's
    :param by_flavor: whether a flavor may choose for its instances
    :param for_existing: for a setting that Nova's driver asks for disks that exist
        alone: the default there, and of the command's verb for these
    """
    return {"choices": choices, "help": help, "by_flavor": by_flavor, "for_existing": for_existing}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How disks are preallocated.

    :raises: ValueError for a value that is not one of a setting's choices
    """

    mode: Mode = dataclasses.field(
        default="falloc",
        metadata=described(
            {
                "falloc": "Map all clusters and set all space aside, without writing it. Takes seconds.",
                "full": "Map all clusters and write zeros to all space. Takes as long as writing the disk once; guests "
                "write fastest afterwards, most of all on XFS.",
                "metadata": "Map all clusters and set nothing aside: the host can still run out of space.",
            },
            """
How instance disks are preallocated, in the words of qemu-img.

Takes effect where ``preallocate_images`` in ``[DEFAULT]`` is ``space``. A
flavor may choose its own mode with the extra spec ``imgprealloc:mode``.
""",
            by_flavor=True,
        ),
    )
    on_unsupported: OnUnsupported = dataclasses.field(
        default="metadata",
        metadata=described(
            {
                "metadata": "Map all clusters, set nothing aside, and log a warning.",
                "full": "Write zeros instead.",
                "error": "Refuse to build the instance, so that another host is tried.",
            },
            """
What to do in mode ``falloc`` on a filesystem that cannot set space aside.

Among these are NFS before 4.2, ext2, ext3, and ZFS.
""",
        ),
    )
    overlay_subclusters: OverlaySubclusters = dataclasses.field(
        default="unallocated",
        metadata=described(
            {
                "unallocated": "Nothing: the base image shows through. A first write to a place updates the cluster "
                "map. Snapshots and block migrations copy what the guest has written, as with stock Nova.",
                "allocated": "What lies beyond the base image's end. First writes there are as fast as on raw. Live "
                "and cold snapshots and block migrations copy all of that, written or not, and need the space for it. "
                "In mode metadata as unallocated.",
                "copied": "Everything: the base image's data is copied into the disk as it is made. First writes are "
                "as fast as on raw everywhere. A build takes as long as that copy, and snapshots and block migrations "
                "copy the whole disk.",
            },
            """
What of an overlay is allocated in its cluster map before its guest writes.

All of an overlay's clusters are mapped, and their space held, whichever is
chosen. A flavor may choose with the extra spec
``imgprealloc:overlay_subclusters``. An overlay that exists keeps what it is
when it grows.
""",
            by_flavor=True,
        ),
    )
    # 128 KiB: 4 KiB subclusters, so that a guest's 4 KiB write copies nothing from the base.
    overlay_cluster_size: int = dataclasses.field(
        default=128 * units.Ki,
        metadata=described(
            {size * units.Ki: f"{size} KiB, with subclusters of {size * 32} bytes." for size in _CLUSTER_SIZES},
            """
Cluster size, in bytes, of the overlays that are made.

A cluster has 32 subclusters, so that the default of 128 KiB lets a guest
write 4 KiB without copying anything from the base image, also on a full
filesystem. Smaller clusters need more metadata; larger ones copy when a guest
writes 4 KiB, for which a full XFS may have no room, and were slower at first
writes.
""",
        ),
    )

    # A hundredth: logs, the image cache and the writes of guests that are not preallocated go on. More than 10 GiB
    # would be lost to disks on a large filesystem, and protect from nothing that 10 GiB do not.
    keep_free: KeepFree = dataclasses.field(
        default=0,
        metadata=described(
            None,
            """
What is left of a filesystem: a size (10G), a part (5%), or the least (1%,10G).

A disk that exists gets no space where less than that would stay
available to others. At a start, and while its guest runs, it stays as
it is then, with a warning, and the instance starts all the same. Disks
that Nova builds, resizes or migrates to this host take what they need,
as with stock Nova. What a filesystem keeps for root does not count as
available. 0 leaves nothing.
""",
            for_existing="1%,10G",
        ),
    )

    def __post_init__(self) -> None:
        for field in fields(type(self)):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices is None:
                _check_part(field.name, value)
            elif value not in choices:
                raise ValueError(f"{field.name} {value!r} is not one of {', '.join(map(str, choices))}")


def _check_part(name: str, value: Any) -> None:
    try:
        sizes.part(value, 0)
    except ValueError as exc:
        raise ValueError(f"{name} {value!r} cannot be: {exc}") from None


def by_flavor() -> tuple[dataclasses.Field[Any], ...]:
    """List the settings that a flavor may choose for its instances."""
    return tuple(field for field in fields() if field.metadata["by_flavor"])


def fields(settings: type[Settings] = Settings) -> tuple[dataclasses.Field[Any], ...]:
    """List the settings there are, with their choices and help as metadata."""
    return dataclasses.fields(settings)
