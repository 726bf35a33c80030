# SPDX-License-Identifier: Apache-2.0
"""What of Nova is overridden or called, and whether this Nova has it as it has to be.

To be imported only once Nova has read its configuration, because imagebackend
reads options as it is imported.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Optional

from nova.compute import utils as compute_utils
from nova.virt.libvirt import driver
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import host as libvirt_host
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import utils as libvirt_utils

# With the parameters that it is called with. These are the same from Nova 27 to 34.
_SEAMS: tuple[tuple[Any, str, tuple[str, ...]], ...] = (
    (imagebackend.Flat, "__init__", ("self", "instance", "disk_name", "path", "disk_info_mapping")),
    (imagebackend.Qcow2, "__init__", ("self", "instance", "disk_name", "path", "disk_info_mapping")),
    *(
        (backend, method, parameters)
        for backend in (imagebackend.Flat, imagebackend.Qcow2)
        for method, parameters in (
            ("cache", ("self", "fetch_func", "filename", "size")),
            ("create_image", ("self", "prepare_template", "base", "size")),
            ("verify_base_size", ("self", "base", "size")),
            ("exists", ("self",)),
            ("get_disk_size", ("self", "name")),
            ("libvirt_info", ("self", "cache_mode", "extra_specs")),
            ("resize_image", ("self", "size")),
            ("resolve_driver_format", ("self",)),
            ("_can_fallocate", ("self",)),
        )
    ),
    (imagebackend.Flat, "correct_format", ("self",)),
    (imagebackend.Flat, "_get_driver_format", ("self",)),
    (imagebackend.Backend, "__init__", ("self", "use_cow")),
    (libvirt_utils, "get_instance_path", ("instance",)),
    (driver.LibvirtDriver, "__init__", ("self", "virtapi", "read_only")),
    (driver.LibvirtDriver, "init_host", ("self", "host")),
    (driver.LibvirtDriver, "cleanup_host", ("self", "host")),
    (libvirt_host.Host, "list_guests", ("self", "only_running")),
    (libvirt_guest.Guest, "get_xml_desc", ("self",)),
    (driver.LibvirtDriver, "_disk_raw_to_qcow2", ("path",)),
    (driver.LibvirtDriver, "finish_migration", ("self", "context", "migration", "instance", "disk_info")),
    (
        driver.LibvirtDriver,
        "_create_images_and_backing",
        ("self", "context", "instance", "instance_dir", "disk_info", "fallback_from_host"),
    ),
    (driver.LibvirtDriver, "pre_live_migration", ("self", "context", "instance")),
    (driver.LibvirtDriver, "_live_migration_data_gb", ("self", "instance", "disk_paths")),
    (driver.LibvirtDriver, "_soft_reboot", ("self", "instance")),
    (driver.LibvirtDriver, "_create_guest", ("self", "context", "xml", "instance", "power_on", "pause")),
    (
        driver.LibvirtDriver,
        "post_live_migration_at_destination",
        ("self", "context", "instance", "network_info", "block_migration", "block_device_info"),
    ),
    (driver.LibvirtDriver, "_get_instance_disk_info", ("self", "instance", "block_device_info")),
)


@dataclasses.dataclass(frozen=True)
class Seam:
    """A place in Nova that the integration depends on, and what is wrong with it, if anything."""

    name: str
    fault: Optional[str]


def compared() -> list[Seam]:
    """Compare each place in Nova that is overridden or called with what it has to be."""
    found = []
    for owner, method, wanted in _SEAMS:
        module = getattr(owner, "__module__", None)
        name = f"{owner.__name__}.{method}" if module is None else f"{module}.{owner.__name__}.{method}"
        function = getattr(owner, method, None)
        if function is None:
            found.append(Seam(name, "it is missing"))
            continue
        parameters = tuple(inspect.signature(function).parameters)
        fault = None if parameters[: len(wanted)] == wanted else f"its parameters are {', '.join(parameters)}"
        found.append(Seam(name, fault))
    semaphore = getattr(compute_utils, "disk_ops_semaphore", None)
    fault = None if hasattr(semaphore, "__enter__") else "it is missing, or cannot be used in a with statement"
    found.append(Seam("nova.compute.utils.disk_ops_semaphore", fault))
    return found
