# SPDX-License-Identifier: Apache-2.0
"""Will this Nova, as it is configured here, preallocate its instances? The answer, fact by fact.

Looks and changes nothing, but for a nameless file in instances_path. Nova is
imported only within check(), after its configuration has been read.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
from importlib import metadata
import importlib.util
import logging
import os
import types
import warnings

from oslo_config import cfg

from imgprealloc import exceptions
from imgprealloc import filesystem
from imgprealloc import opts
from imgprealloc import qemu_img
from imgprealloc import storage

DRIVER = "imgprealloc.LibvirtDriver"
_SUPPORTED = range(27, 35)
_FILE_BACKENDS = ("default", "qcow2", "raw", "flat")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    :param subject: what it is
    :param good: whether instances can be preallocated as far as this goes
    :param detail: what was found, and where it is not good, the way out
    :param is_one_of_many: whether it is worth a line only where it is not good
    """

    subject: str
    good: bool
    detail: str
    is_one_of_many: bool = False


def check(config_files: list[str]) -> Iterator[Finding]:
    """Look at Nova, qemu-img, the configuration and the filesystem.

    :param config_files: as for nova-compute's --config-file; none: Nova's own
        default places
    """
    try:
        version = metadata.version("nova")
    except metadata.PackageNotFoundError:
        yield Finding("Nova", False, "not installed in this environment; run the imgprealloc of Nova's environment")
        return
    known = int(version.split(".")[0]) in _SUPPORTED
    tested = f"tested with {_SUPPORTED.start} to {_SUPPORTED.stop - 1}"
    yield Finding("Nova", known, version if known else f"{version} is not known; {tested}")

    # Nova settles eventlet or threads as it is imported; here is no service.
    os.environ.setdefault("OS_NOVA_DISABLE_EVENTLET_PATCHING", "true")
    # And nobody here can heed what Nova's own libraries warn and tell of.
    warnings.simplefilter("ignore")
    logging.getLogger("oslo_service").setLevel(logging.WARNING)
    import nova.conf

    conf = nova.conf.CONF
    try:
        conf([], project="nova", prog="nova-compute", default_config_files=config_files or None)
        opts.register(conf)
        opts.validate(conf)
    except (cfg.Error, ValueError) as exc:
        yield Finding("configuration", False, str(exc))
        return
    yield Finding("configuration", True, ", ".join(conf.config_file or ["no file: all defaults"]))
    # Not earlier: see the module.
    from imgprealloc import seams
    import imgprealloc.nova as integration

    for seam in seams.compared():
        yield Finding(seam.name, seam.fault is None, seam.fault or "as expected", is_one_of_many=True)
    yield _driver(conf, integration)
    yield _switch(conf, integration)
    yield _backend(conf)
    yield _qemu_img()
    yield from _given_back(conf)
    yield _instances_path(conf)


def _driver(conf: cfg.ConfigOpts, integration: types.ModuleType) -> Finding:
    if integration.is_patched(conf.use_cow_images):
        patched = f"{conf.compute_driver}, and imagebackend is patched (contrib/), but not what the driver does itself"
        return Finding("compute_driver", True, patched)
    if conf.compute_driver != DRIVER:
        return Finding("compute_driver", False, f"{conf.compute_driver}; set [DEFAULT] compute_driver = {DRIVER}")
    for module in ("nova.virt.imgprealloc", "nova.privsep.imgprealloc"):
        if importlib.util.find_spec(module) is None:
            return Finding(
                "compute_driver",
                False,
                f"{DRIVER}, but {module.replace('.', '/')}.py is not in Nova's package; "
                "install imgprealloc with pip into the environment, or folder, that Nova is installed in",
            )
    return Finding("compute_driver", True, DRIVER)


def _switch(conf: cfg.ConfigOpts, integration: types.ModuleType) -> Finding:
    good = integration.is_on(conf)
    remedy = "" if good else "; set [DEFAULT] preallocate_images = space"
    return Finding("preallocate_images", good, f"{conf.preallocate_images}{remedy}")


def _backend(conf: cfg.ConfigOpts) -> Finding:
    kind = conf.libvirt.images_type
    good = kind in _FILE_BACKENDS
    remedy = "" if good else "; its disks are no files, so there is nothing to preallocate"
    return Finding("[libvirt] images_type", good, f"{kind}{remedy}")


def _qemu_img() -> Finding:
    try:
        version = qemu_img.version()
    except exceptions.PreallocationError as exc:
        return Finding("qemu-img", False, str(exc))
    text = ".".join(map(str, version))
    if version < qemu_img.OVERLAY_PREALLOCATION:
        return Finding("qemu-img", False, f"{text} cannot preallocate overlays; install 5.2 or later")
    return Finding("qemu-img", True, text)


def _given_back(conf: cfg.ConfigOpts) -> Iterator[Finding]:
    """Tell of a QEMU with which guests give space back, and what is done about it; that keeps nobody from starting."""
    try:
        is_kept = qemu_img.version() >= qemu_img.KEEPS_ZEROED_SPACE
    except exceptions.PreallocationError:
        # As _qemu_img() has said.
        return
    if is_kept:
        return
    if conf.compute_driver == DRIVER and opts.refills(conf):
        outcome = f"nova-compute sets it aside again every {conf.imgprealloc.heal_interval} s (heal_interval)"
    elif conf.compute_driver == DRIVER:
        outcome = "nothing sets it aside again until the next start (heal_interval, protect_from_discard)"
    else:
        outcome = "run imgprealloc allocate from a timer (contrib/systemd), which sets it aside again"
    yield Finding(
        "WRITE ZEROES",
        True,
        "before QEMU 9.1 a guest gives some space back by mkfs and mount, whatever it is told of discards; " + outcome,
    )


def _instances_path(conf: cfg.ConfigOpts) -> Finding:
    path = conf.instances_path
    if not os.path.isdir(path):
        return Finding("instances_path", False, f"{path} is not there; create it, or start nova-compute once")
    try:
        under = filesystem.under(path)
    except OSError as exc:
        return Finding("instances_path", False, f"{path}: {exc.strerror}; run this as the user of nova-compute")
    text = f"{path}, on {under.name}"
    mode = conf.imgprealloc.mode
    thin = storage.thin_below_folder(path) if under.fallocate and mode == "falloc" else ""
    if thin:
        remedy = "mode falloc holds nothing there, full does: set [imgprealloc] mode = full"
        return Finding("instances_path", False, f"{text}, on thin storage ({thin}); {remedy}")
    if under.fallocate and mode != "metadata":
        return Finding("instances_path", True, f"{text}, which can hold space (mode {mode})")
    if under.fallocate:
        return Finding("instances_path", False, f"{text}; mode metadata maps disks and holds no space for them")
    fallback = mode if mode != "falloc" else conf.imgprealloc.on_unsupported
    good = fallback == "full" and not under.copy_on_write
    outcome = {
        "full": "disks are written with zeros",
        "metadata": "disks are mapped, and no space is held for them",
        "error": "no instance can be built (on_unsupported = error)",
    }[fallback]
    return Finding("instances_path", good, f"{text}, which cannot set space aside: {outcome}")
