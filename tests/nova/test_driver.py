# SPDX-License-Identifier: Apache-2.0
"""compute_driver = imgprealloc.LibvirtDriver, or Nova patched (contrib/), by Nova's own loader."""

from __future__ import annotations

from collections.abc import Callable
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest

# In a process of its own, because a driver is loaded once in a service's life.
_LOAD = """
import sys, warnings
warnings.simplefilter("ignore")
import nova.tests.unit
import nova.conf
nova.conf.CONF(["--config-file", sys.argv[1]], project="nova")
{before}
from unittest import mock
from nova.virt import driver
loaded = driver.load_compute_driver(mock.Mock())
from nova.virt.libvirt import imagebackend
for name, backend in sorted(loaded.image_backend.BACKEND.items()):
    print(name, backend.__module__, issubclass(backend, imagebackend.Image))
"""


@pytest.fixture
def load(tmp_path: pathlib.Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Load the compute driver that a nova.conf names."""

    def run(nova_conf: str, before: str = "") -> subprocess.CompletedProcess[str]:
        path = tmp_path / "nova.conf"
        path.write_text(textwrap.dedent(nova_conf))
        return subprocess.run(
            [sys.executable, "-c", _LOAD.format(before=before), str(path)],
            env={**os.environ, "OS_NOVA_DISABLE_EVENTLET_PATCHING": "true"},
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
        )

    return run


_PATCH = pathlib.Path(__file__).parents[2] / "contrib" / "nova-imagebackend.patch"

OURS = """
    [DEFAULT]
    compute_driver = imgprealloc.LibvirtDriver
    preallocate_images = space
"""


STOCK = "[DEFAULT]\ncompute_driver = libvirt.LibvirtDriver\n"

PREALLOCATING = [
    "default imgprealloc.nova True",
    "flat imgprealloc.nova True",
    "lvm nova.virt.libvirt.imagebackend True",
    "ploop nova.virt.libvirt.imagebackend True",
    "qcow2 imgprealloc.nova True",
    "raw imgprealloc.nova True",
    "rbd nova.virt.libvirt.imagebackend True",
]


def test_novas_loader_finds_our_driver_and_gets_preallocating_backends(
    load: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = load(OURS)

    assert done.stdout.splitlines() == PREALLOCATING, done.stderr


def test_novas_own_driver_stays_stock_beside_us(load: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = load(STOCK)

    assert "qcow2 nova.virt.libvirt.imagebackend True" in done.stdout
    assert "imgprealloc" not in done.stdout


@pytest.fixture
def patched(tmp_path: pathlib.Path) -> pathlib.Path:
    """Apply the patch to the letter to a copy of this Nova's nova/virt/libvirt; return the copy's nova/virt."""
    spec = importlib.util.find_spec("nova")
    assert spec is not None
    assert spec.origin is not None
    virt = tmp_path / "nova" / "virt"
    shutil.copytree(pathlib.Path(spec.origin).with_name("virt") / "libvirt", virt / "libvirt")
    command = ["patch", "--strip=1", "--fuzz=0", "--directory", str(tmp_path), "--input", str(_PATCH)]
    subprocess.run(command, check=True)
    return virt


@pytest.mark.parametrize("nova_conf", [STOCK, OURS], ids=["libvirt.LibvirtDriver", "imgprealloc.LibvirtDriver"])
def test_nova_with_the_patch_gets_preallocating_backends(
    load: Callable[..., subprocess.CompletedProcess[str]], patched: pathlib.Path, nova_conf: str
) -> None:
    done = load(nova_conf, f"import nova.virt; nova.virt.__path__.insert(0, {str(patched)!r})")

    assert done.stdout.splitlines() == PREALLOCATING, done.stderr


@pytest.mark.parametrize(
    ("option", "value"), [("mode", "sparse"), ("existing_disks", "delete"), ("overlay_cluster_size", "4096")]
)
def test_option_that_there_is_not_is_refused_by_name_when_the_service_starts(
    load: Callable[..., subprocess.CompletedProcess[str]], option: str, value: str
) -> None:
    done = load(f"{OURS}\n    [imgprealloc]\n    {option} = {value}\n")

    assert done.returncode != 0
    assert option in done.stderr


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ("ib.Image.cache = lambda self, filename: None", "cache: its parameters are self, filename"),
        ("del ib.Image._can_fallocate", "_can_fallocate: it is missing"),
        ("import nova.compute.utils as cu; del cu.disk_ops_semaphore", "disk_ops_semaphore"),
    ],
)
def test_nova_that_has_changed_is_refused_with_the_place_named(
    load: Callable[..., subprocess.CompletedProcess[str]], change: str, culprit: str
) -> None:
    done = load(OURS, f"import nova.virt.libvirt.imagebackend as ib; {change}")

    assert done.returncode != 0
    assert culprit in done.stderr
