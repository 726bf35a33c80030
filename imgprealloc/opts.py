# SPDX-License-Identifier: Apache-2.0
"""The options in nova.conf's [imgprealloc], and how a Preallocator is made from them."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
from types import MappingProxyType
from typing import Any

from oslo_config import cfg
from oslo_config import types

from imgprealloc import settings
from imgprealloc import sizes
from imgprealloc.preallocator import Preallocator

GROUP = cfg.OptGroup("imgprealloc", title="Preallocation of instance disks")

# A flavor's own choices: the setting's field, and the name of its extra spec.
EXTRA_SPECS = {field.name: f"{GROUP.name}:{field.name}" for field in settings.by_flavor()}


class _Part(types.String):  # type: ignore[misc]
    """A part of a filesystem."""

    def __call__(self, value: Any) -> str:
        """Take it as it is written, if it can be understood.

        :raises: ValueError
        """
        sizes.part(value, 0)
        return str(value)


def _option(field: dataclasses.Field[Any]) -> cfg.Opt:
    """Make an option of nova.conf of a setting."""
    choices = field.metadata["choices"]
    if choices is None:
        default = field.metadata["for_existing"] or field.default
        return cfg.Opt(field.name, type=_Part(), default=default, help=field.metadata["help"])
    # Not IntOpt, which takes no choices before oslo.config 9.3.
    kind = types.Integer if isinstance(field.default, int) else types.String
    named = kind(choices=list(choices.items()))
    return cfg.Opt(field.name, type=named, default=field.default, help=field.metadata["help"])


# What Nova alone asks for.
_NOVA_OPTIONS = (
    cfg.StrOpt(
        "existing_disks",
        default="reserve",
        choices=[
            ("reserve", "Set aside the space that the disk may grow to, and leave the file as it is."),
            ("rewrite", "Copy the disk into a preallocated one when its instance is started or hard rebooted. Needs "
             "space for both, and the start waits for the copy."),
        ],
        help="""
What to do with disks that have data in them and are not preallocated.

These are the disks of instances that are older than this setting, and those
that came from a host without it. Their content is never changed. At the host's
boot, a resume, an unrescue and a soft reboot their space is set aside at the most. A disk that
Nova's records (disk.info) do not name as what it is taken for is not rewritten.
""",
    ),
    cfg.BoolOpt(
        "protect_from_discard",
        default=True,
        help="""
Keep guests from giving preallocated space back.

With ``hw_disk_discard = unmap`` in ``[libvirt]`` a TRIM in the guest would free
the space again. When this is true, disks whose space is held ignore it.
Before QEMU 9.1 that does not stop zero writes with leave to unmap, as mkfs
makes them; heal_interval is for these.
""",
    ),
    cfg.IntOpt(
        "heal_interval",
        default=600,
        min=0,
        help="""
Seconds between looks at the disks of running guests, in the background.

Space within a disk's file that its guest has given back all the same is set
aside again: before QEMU 9.1 a Linux guest gives some back with each mkfs and
mount, whatever it is told of discards (WRITE ZEROES with unmap). Between two
looks such a disk is short of that much. A round takes a tenth of the time at
the most. 0 looks only when an instance is started. Nothing is looked at where
guests may give space back (hw_disk_discard = unmap without
protect_from_discard).
""",
    ),
)  # fmt: skip

OPTIONS = (*map(_option, settings.fields()), *_NOVA_OPTIONS)


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


def refills(conf: cfg.ConfigOpts) -> bool:
    """Whether what running guests give back is set aside again, where disks are preallocated at all."""
    may_give_back = conf.libvirt.hw_disk_discard == "unmap" and not conf.imgprealloc.protect_from_discard
    return bool(conf.imgprealloc.heal_interval) and not may_give_back


def preallocator_from(conf: cfg.ConfigOpts, chosen: Mapping[str, Any] = MappingProxyType({})) -> Preallocator:
    """Return the Preallocator that conf.imgprealloc describes, for disks that are made or grown.

    :param chosen: what a flavor has instead, by the settings' names
    """
    named = {
        field.name: getattr(conf.imgprealloc, field.name)
        for field in settings.fields()
        if field.metadata["for_existing"] is None
    }
    return Preallocator(**{**named, **chosen})


def for_existing(conf: cfg.ConfigOpts, strategy: Preallocator) -> Preallocator:
    """Return the strategy for disks that are there, and for which nobody is to go short."""
    named = {
        field.name: getattr(conf.imgprealloc, field.name)
        for field in settings.fields()
        if field.metadata["for_existing"] is not None
    }
    return dataclasses.replace(strategy, **named)
