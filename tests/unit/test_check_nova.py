# SPDX-License-Identifier: Apache-2.0
"""What check-nova says of a QEMU; the rest of it needs Nova."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import fixtures
from oslo_config import cfg
import pytest

from imgprealloc import check_nova
from imgprealloc import opts

from .host import Host


def _conf(tmp_path: pathlib.Path, text: str = "") -> cfg.ConfigOpts:
    """Read a nova.conf of this text; options are not set, because all configurations share their group."""
    path = tmp_path / "nova.conf"
    path.write_text(text)
    conf = cfg.ConfigOpts()
    conf.register_opt(cfg.StrOpt("compute_driver", default=check_nova.DRIVER))
    conf.register_opt(cfg.StrOpt("hw_disk_discard"), group="libvirt")
    conf.register_opt(cfg.StrOpt("instances_path", default=str(tmp_path / "instances")))
    opts.register(conf)
    conf(["--config-file", str(path)], default_config_files=[], default_config_dirs=[])
    return conf


@pytest.mark.parametrize("version", ["5.2.0", "7.2.22", "9.0.4"])
def test_qemu_with_which_guests_give_space_back_is_told_and_is_no_fault(
    host: Host, tmp_path: pathlib.Path, version: str
) -> None:
    host.version = version

    [found] = check_nova._given_back(_conf(tmp_path))

    assert found.good
    assert "every 600 s" in found.detail


@pytest.mark.parametrize("version", ["9.1.0", "10.0.13", "11.1.3"])
def test_nothing_is_told_of_a_qemu_with_which_guests_keep_their_space(
    host: Host, tmp_path: pathlib.Path, version: str
) -> None:
    host.version = version

    assert not list(check_nova._given_back(_conf(tmp_path)))


@pytest.mark.parametrize(
    "text",
    [
        "[imgprealloc]\nheal_interval = 0\n",
        "[libvirt]\nhw_disk_discard = unmap\n[imgprealloc]\nprotect_from_discard = false\n",
    ],
)
def test_who_has_switched_healing_off_is_told_that_nothing_heals(host: Host, tmp_path: pathlib.Path, text: str) -> None:
    [found] = check_nova._given_back(_conf(tmp_path, text))

    assert "nothing sets it aside again" in found.detail


def test_who_has_the_patch_and_not_the_driver_is_told_of_the_command(host: Host, tmp_path: pathlib.Path) -> None:
    [found] = check_nova._given_back(_conf(tmp_path, "[DEFAULT]\ncompute_driver = libvirt.LibvirtDriver\n"))

    assert "imgprealloc allocate from a timer (contrib/systemd)" in found.detail


def test_missing_qemu_img_is_told_once(host: Host, tmp_path: pathlib.Path) -> None:
    host.uninstall("qemu-img")

    assert not list(check_nova._given_back(_conf(tmp_path)))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied; run this as the user of nova-compute"),
        (FileNotFoundError(2, "No such file or directory"), "is not there; create it"),
    ],
)
def test_folder_that_somebody_may_not_look_at_is_not_said_to_be_missing(
    tmp_path: pathlib.Path, error: OSError, said: str
) -> None:
    folder = str(tmp_path / "instances")

    def refused(function: Any) -> Any:
        def refuse(path: Any, *more: Any, **named: Any) -> Any:
            if str(path).startswith(folder):
                raise error
            return function(path, *more, **named)

        return fixtures.MockPatchObject(os, function.__name__, refuse)

    with refused(os.stat), refused(os.open):
        found = check_nova._instances_path(_conf(tmp_path))

    assert not found.good
    assert said in found.detail
