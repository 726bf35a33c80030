# SPDX-License-Identifier: Apache-2.0
"""The image cache and disk.info, which are none of our business and stay as with stock Nova."""

from __future__ import annotations

from collections.abc import Callable
import json
import os
from unittest import mock

import compute_host
from compute_host import KINDS
from compute_host import Host
from oslo_utils import units

from nova.virt import images


def _cached(node: Host) -> dict[str, tuple[int, int]]:
    cache = os.path.join(node.path, "_base")
    found = {name: os.stat(os.path.join(cache, name)) for name in os.listdir(cache)}
    return {name: (status.st_size, status.st_blocks) for name, status in found.items()}


def _thin_image(node: Host) -> None:
    path = os.path.join(node.path, "thin")
    with open(path, "wb") as file:
        file.truncate(units.Gi)
    node.images[compute_host.IMAGE] = path


def test_precached_image_is_not_preallocated(host: Callable[..., Host]) -> None:
    node = host()
    _thin_image(node)
    glance = mock.Mock()
    glance.get.return_value = {"disk_format": "raw"}
    glance.download.side_effect = lambda context, image_id, dest_path, trusted_certs: node.fetch(
        context, dest_path, image_id
    )

    with mock.patch.object(images, "IMAGE_API", glance):
        assert node.driver.cache_image(compute_host.CONTEXT, compute_host.IMAGE)

    assert list(_cached(node).values()) == [(units.Gi, 0)]


@KINDS
def test_cache_holds_what_stock_nova_would_have_in_it(host: Callable[..., Host], kind: str) -> None:
    def left_by(node: Host) -> dict[str, tuple[int, int]]:
        _thin_image(node)
        node.spawn(node.instance())
        return _cached(node)

    ours = left_by(host(libvirt__images_type=kind))
    stock = left_by(host(preallocated=False, libvirt__images_type=kind))

    assert (units.Gi, 0) in ours.values()
    assert ours == stock


@KINDS
def test_cache_takes_as_much_of_placements_disk_as_with_stock_nova(host: Callable[..., Host], kind: str) -> None:
    def reserved_by(node: Host) -> tuple[int, int]:
        node.spawn(node.instance())
        return (
            node.driver.image_cache_manager.get_disk_usage(),
            node.driver._get_disk_size_reserved_for_image_cache(),
        )

    options = {"libvirt__images_type": kind, "workarounds__reserve_disk_resource_for_image_cache": True}
    ours = reserved_by(host(**options))
    stock = reserved_by(host(preallocated=False, **options))

    assert ours[1] > 0
    assert ours == stock


@KINDS
def test_formats_are_noted_as_by_stock_nova(host: Callable[..., Host], kind: str) -> None:
    def noted_by(node: Host) -> dict[str, str]:
        instance = node.spawn(node.instance())
        with open(node.disk(instance, "disk.info")) as file:
            return {os.path.basename(path): format for path, format in json.load(file).items()}

    ours = noted_by(host(libvirt__images_type=kind))
    stock = noted_by(host(preallocated=False, libvirt__images_type=kind))

    assert ours == stock
