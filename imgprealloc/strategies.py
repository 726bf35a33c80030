# SPDX-License-Identifier: Apache-2.0
"""Which strategy an instance's disks get: its flavor's word, else nova.conf's, and what is just being done to it.

Asked by nova alone, but knows nothing of Nova's own classes: an instance is what has a uuid and a flavor.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import os
from typing import Any, Optional

from oslo_config import cfg

from imgprealloc import healing
from imgprealloc import log
from imgprealloc import opts
from imgprealloc import settings
from imgprealloc.format import Existing
from imgprealloc.preallocator import Preallocator

CONF = cfg.CONF

# By their ids: whose disks are being made here for QEMU's mirror to overwrite.
_expected: set[str] = set()

# The instances whose migration to here, or resize, is being finished, by their ids, which name the folders that
# their disks are in.
_arriving: dict[str, Any] = {}


@contextlib.contextmanager
def expecting(instance: Any) -> Iterator[None]:
    """Let what is made for an instance in the block be the target of QEMU's mirror."""
    _expected.add(instance.uuid)
    try:
        yield
    finally:
        _expected.discard(instance.uuid)


@contextlib.contextmanager
def arriving(instance: Any) -> Iterator[None]:
    """Let an instance be one that comes to this host, or is resized, for as long as the block runs."""
    _arriving[instance.uuid] = instance
    try:
        yield
    finally:
        del _arriving[instance.uuid]


def arriving_with(path: str) -> Optional[Any]:
    """Return the instance that is just arriving, and has a disk at path; None for all others."""
    return _arriving.get(os.path.basename(os.path.dirname(path)))


def asked_for(instance: Any) -> Preallocator:
    """Return the strategy that an instance's flavor, or else nova.conf, asks for."""
    extra_specs = getattr(getattr(instance, "flavor", None), "extra_specs", None) or {}
    chosen = {}
    for field in settings.by_flavor():
        extra_spec = opts.EXTRA_SPECS[field.name]
        value = extra_specs.get(extra_spec)
        if value in field.metadata["choices"]:
            chosen[field.name] = value
        elif value is not None:
            # Nova's API validates extra specs from its version 2.86 on, and an
            # instance keeps its flavor for life.
            log.warn_once(
                str(value),
                extra_spec,
                f"a flavor has {value!r}, which is no {field.name}; [imgprealloc] {field.name} is taken instead",
            )
    return opts.preallocator_from(CONF, chosen)


def now(instance: Any) -> Preallocator:
    """Return an instance's strategy for disks that are made now, to which QEMU's mirror may be about to write."""
    strategy = asked_for(instance)
    if getattr(instance, "uuid", None) not in _expected:
        return strategy
    if strategy.mode == "full":
        log.warn_once(
            "zeros",
            "block live migration",
            "the disks that it makes here get mode falloc instead of full, because QEMU overwrites them; "
            "what the guest has not written stays unwritten",
        )
    # Nor is anything allocated in it but what the mirror writes: it becomes what the source is.
    return dataclasses.replace(healing.without_zeros(strategy), overlay_subclusters="unallocated")


def for_existing(instance: Any) -> Preallocator:
    """Return an instance's strategy for disks that are there."""
    strategy = now(instance)
    if getattr(instance, "uuid", None) in _arriving:
        # The room for those that arrive has just been asked for, and granted, by Nova's scheduler.
        return strategy
    return opts.for_existing(CONF, strategy)


def existing_disks() -> Existing:
    """Return what nova.conf lets happen to disks with data."""
    return "rewrite" if CONF.imgprealloc.existing_disks == "rewrite" else "reserve"
