# SPDX-License-Identifier: Apache-2.0
"""python-openstackclient, as the cloud's operator uses it."""

from __future__ import annotations

import functools
import json
from typing import Any

from debian_cloud import configuration
from debian_cloud import services

_ACCOUNT = {
    "auth_url": configuration.IDENTITY,
    "username": "admin",
    "password": configuration.PASSWORD,
    "project_name": "admin",
    "user_domain_name": "Default",
    "project_domain_name": "Default",
}

# 2.37 brought networks = "none".
_COMPUTE_API = "2.90"


def openstack(*command: str) -> str:
    """Run a command, and return what it says."""
    account = {f"OS_{name.upper()}": value for name, value in _ACCOUNT.items()}
    told = {
        "OS_REGION_NAME": configuration.REGION,
        "OS_IDENTITY_API_VERSION": "3",
        "OS_COMPUTE_API_VERSION": _COMPUTE_API,
    }
    return services.run("openstack", *command, environment={**account, **told})


def shown(*command: str) -> Any:
    """Run a command that shows something, and return that."""
    return json.loads(openstack(*command, "-f", "json"))


@functools.cache
def cloud() -> Any:
    """Return a connection of the SDK that the client uses: for what is asked often, or not looked at here."""
    # Which is in the chroot alone.
    import openstack

    return openstack.connect(auth=_ACCOUNT, region_name=configuration.REGION, compute_default_microversion=_COMPUTE_API)
