# SPDX-License-Identifier: Apache-2.0
"""What Nova's API is told about our flavor extra specs, so that a mistyped one is refused.

Loaded by nova-api through the entry point nova.api.extra_spec_validators.
Apart from imgprealloc.nova because nova-api has no use for a libvirt driver.
"""

from __future__ import annotations

from nova.api.validation.extra_specs import base

from imgprealloc import opts
from imgprealloc import settings


def register() -> list[base.ExtraSpecValidator]:
    """Return the validators, as Nova calls them."""
    return [
        base.ExtraSpecValidator(
            name=opts.EXTRA_SPECS[field.name],
            description=f"Instead of [imgprealloc] {field.name}. {field.metadata['help'].strip().splitlines()[0]}",
            value={
                "type": str,
                "description": "One of those that nova.conf knows.",
                "enum": list(field.metadata["choices"]),
            },
        )
        for field in settings.by_flavor()
    ]
