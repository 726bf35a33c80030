# SPDX-License-Identifier: Apache-2.0
"""Real Nova's image backends without a cloud around them: for the demo, the benchmarks and the tests.

Nova's cache(), create_image() and libvirt_info() are called as its libvirt
driver calls them; only the download from Glance is a link to a local file.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import types
from typing import Any

# Nova 27 to 33 would patch the whole interpreter for eventlet otherwise.
os.environ.setdefault("OS_NOVA_DISABLE_EVENTLET_PATCHING", "true")

import loop_filesystem
import nova.conf

# For its option lock_path, which nothing above imports in every environment.
import oslo_concurrency.lockutils  # noqa: F401
from oslo_utils import uuidutils

import nova.privsep

CONF = nova.conf.CONF
new_uuid = uuidutils.generate_uuid


def _get_privileges() -> None:
    """Have Nova do as root itself what it would have its daemon do, or start that as a service does."""
    context = nova.privsep.sys_admin_pctxt
    if loop_filesystem.AS_ROOT:
        helper = os.path.join(os.path.dirname(sys.executable), "privsep-helper")
        CONF.set_override("helper_command", shlex.join([*loop_filesystem.AS_ROOT, helper]), group=context.cfg_section)
    context.set_client_mode(bool(loop_filesystem.AS_ROOT))


class Disks:
    """Instance disks as nova-compute makes them, under an instances_path of their own.

    :param instances_path: an empty folder, on the filesystem in question
    :param preallocated: whether by imgprealloc's classes or by stock Nova's
    :param options: of nova.conf, those in a group as in libvirt__images_type
    """

    def __init__(self, instances_path: str, *, preallocated: bool, **options: Any) -> None:
        self.instances_path = instances_path
        CONF.reset()
        CONF([], default_config_files=[], default_config_dirs=[], project="nova")
        CONF.set_override("instances_path", instances_path)
        CONF.set_override("preallocate_images", "space")
        CONF.set_override("lock_path", os.path.join(instances_path, "locks"), group="oslo_concurrency")
        _get_privileges()
        # Only now: imagebackend reads options as it is imported.
        from nova.virt.libvirt import imagebackend

        import imgprealloc.nova

        imgprealloc.opts.register(CONF)
        for name, value in options.items():
            group, _, option = name.rpartition("__")
            CONF.set_override(option, value, group=group or None)
        self.backend = imagebackend.Backend(CONF.use_cow_images)
        if preallocated:
            self.backend.BACKEND = imgprealloc.nova.preallocating(self.backend.BACKEND)

    def instance(self, **extra_specs: str) -> Any:
        """Return as much of an instance as Nova's image backends look at."""
        uuid = uuidutils.generate_uuid()
        os.makedirs(os.path.join(self.instances_path, uuid))
        flavor = types.SimpleNamespace(extra_specs=extra_specs)
        return types.SimpleNamespace(uuid=uuid, flavor=flavor, name=f"instance-{uuid[:8]}")

    def image(self, instance: Any, name: str = "disk", image_type: str = "qcow2") -> Any:
        """Return Nova's object for one disk."""
        mapping = {"bus": "virtio", "dev": "vda", "type": "disk"}
        return self.backend.by_name(instance, name, image_type, disk_info_mapping=mapping)

    def image_at(self, path: str, image_type: str = "qcow2") -> Any:
        """Return Nova's object for a disk that is there already."""
        instance = types.SimpleNamespace(uuid="unused", flavor=types.SimpleNamespace(extra_specs={}))
        return self.backend.by_libvirt_path(instance, path, image_type)

    def spawn(self, base: str, size: int | None, *, name: str = "disk", image_type: str = "qcow2", **specs: str) -> Any:
        """Make a disk of a new instance from a base image, as a boot from Glance does."""
        image = self.image(self.instance(**specs), name, image_type)
        self.cache(image, base, size)
        return image

    def cache(self, image: Any, base: str, size: int | None) -> None:
        """Run Nova's cache() on a disk, as each start of its instance does."""

        def fetch(target: str, **_: Any) -> None:
            try:
                os.link(base, target)
            except OSError:
                shutil.copyfile(base, target)

        image.cache(
            fetch_func=fetch, context=None, filename=os.path.basename(base), image_id="an-image", size=size,
            trusted_certs=None,
        )  # fmt: skip

    def generate(self, image: Any, size: int, fetch: Any, **kwargs: Any) -> None:
        """Run Nova's cache() on a disk that Nova formats itself, such as a swap disk."""
        name = f"{os.path.basename(image.path)}_{size}"
        image.cache(fetch_func=fetch, context=None, filename=name, size=size, **kwargs)
