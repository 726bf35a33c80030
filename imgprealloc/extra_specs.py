# SPDX-License-Identifier: Apache-2.0
"""What Nova's API is told about our flavor extra specs, so that a mistyped one is refused.

Loaded by nova-api through the entry point nova.api.extra_spec_validators.
Apart from imgprealloc.nova because nova-api has no use for a libvirt driver.
"""

from __future__ import annotations

from typing import get_args

from nova.api.validation.extra_specs import base

from imgprealloc import opts
from imgprealloc import settings


def register() -> list[base.ExtraSpecValidator]:
    """Return the validators, as Nova calls them."""
    return [
        base.ExtraSpecValidator(
            name=opts.MODE_EXTRA_SPEC,
            description="How the local disks of instances are preallocated, instead of [imgprealloc] mode.",
            value={
                "type": str,
                "description": "A preallocation mode of qemu-img.",
                "enum": list(get_args(settings.Mode)),
            },
        )
    ]
