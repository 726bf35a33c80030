# SPDX-License-Identifier: Apache-2.0
"""The disks that are compared: what each is called, how it is made, and how Nova has QEMU open it."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import os
import shutil
import subprocess
from typing import Literal, get_args

from imgprealloc import Preallocator
from imgprealloc.settings import Mode
from imgprealloc.settings import OverlaySubclusters
from imgprealloc.settings import Settings

KIB = 1024

STOCK = "stock Nova"
# The same once more, which tells what is noise.
CONTROL = "stock Nova, again"
NONE = "no preallocation"

# What imgprealloc makes where nothing else is said.
CLUSTER_SIZE = Settings().overlay_cluster_size

MODES: tuple[Mode, ...] = get_args(Mode)
SUBCLUSTERS: tuple[OverlaySubclusters, ...] = get_args(OverlaySubclusters)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kind of disk.

    :param make: takes an empty folder, the base image and the size in bytes;
        returns the disk's path
    :param aio: what Nova chooses: native where its space is taken for held
    """

    title: str
    format: str
    make: Callable[[str, str, int], str]
    aio: Literal["native", "threads"] = "native"


def ours(mode: str, subclusters: str, cluster_size: int = CLUSTER_SIZE) -> str:
    """Name a disk of imgprealloc's."""
    named = f"imgprealloc, {mode}, {subclusters}"
    return named if cluster_size == CLUSTER_SIZE else f"{named}, {cluster_size // KIB}k"


def raw(mode: str) -> str:
    """Name a raw disk, which is the limit of what an overlay can reach."""
    return f"raw, {mode}"


def proxmox(mode: str) -> str:
    """Name an overlay made as Proxmox VE makes it."""
    return f"Proxmox, {mode}"


def overlay(mode: Mode, subclusters: OverlaySubclusters, cluster_size: int = CLUSTER_SIZE) -> Subject:
    """Return an overlay of imgprealloc's."""
    strategy = Preallocator(mode, overlay_cluster_size=cluster_size, overlay_subclusters=subclusters)

    def make(folder: str, base: str, size: int) -> str:
        return strategy.create(os.path.join(folder, "disk"), size, base, backing_format="raw").path

    return Subject(ours(mode, subclusters, cluster_size), "qcow2", make, _aio(mode))


def every(spawn: Callable[[str, int], str]) -> list[Subject]:
    """List all disks that the full form compares.

    :param spawn: makes a disk by stock Nova's code, from a base image and of a size
    """
    return [
        *limits(spawn),
        Subject(NONE, "qcow2", _thin, "threads"),
        *(_proxmox(mode) for mode in ("metadata", "falloc")),
        *(overlay(mode, subclusters) for mode in MODES for subclusters in SUBCLUSTERS),
    ]


def few(spawn: Callable[[str, int], str]) -> list[Subject]:
    """List the disks that the short form compares: those that the goals are about."""
    return [
        *limits(spawn),
        overlay("falloc", "unallocated"),
        overlay("falloc", "allocated"),
        overlay("falloc", "copied"),
        overlay("full", "unallocated"),
    ]


def by_cluster_size(spawn: Callable[[str, int], str], modes: list[Mode], sizes: list[int]) -> list[Subject]:
    """List overlays that differ in their clusters only."""
    return [*limits(spawn), *(overlay(mode, "unallocated", size) for mode in modes for size in sizes)]


def limits(spawn: Callable[[str, int], str]) -> list[Subject]:
    """List what an overlay is held against: stock Nova's, and what has no base and no map."""

    def stock(folder: str, base: str, size: int) -> str:
        return spawn(base, size)

    twice = [Subject(title, "qcow2", stock) for title in (STOCK, CONTROL)]
    return [*twice, *(_raw(mode) for mode in ("falloc", "full"))]


def _raw(mode: Mode) -> Subject:
    def make(folder: str, base: str, size: int) -> str:
        # As Nova's: with the base image's data in it.
        path = os.path.join(folder, "disk")
        shutil.copyfile(base, path)
        os.truncate(path, size)
        return Preallocator(mode).preallocate(path, format="raw").path

    return Subject(raw(mode), "raw", make)


def _proxmox(mode: Mode) -> Subject:
    options = f"extended_l2=on,cluster_size=128k,preallocation={mode}"
    return Subject(proxmox(mode), "qcow2", functools.partial(_created, options), _aio(mode))


def _thin(folder: str, base: str, size: int) -> str:
    return _created("", folder, base, size)


def _created(options: str, folder: str, base: str, size: int) -> str:
    path = os.path.join(folder, "disk")
    chosen = ["-o", options] if options else []
    created = ["qemu-img", "create", "-q", "-f", "qcow2", *chosen, "-b", base, "-F", "raw", path, str(size)]
    subprocess.run(created, check=True)
    return path


def _aio(mode: Mode) -> Literal["native", "threads"]:
    return "threads" if mode == "metadata" else "native"
