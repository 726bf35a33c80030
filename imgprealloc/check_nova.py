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
import shlex
import sys
import types
import warnings

from oslo_config import cfg

from imgprealloc import exceptions
from imgprealloc import filesystem
from imgprealloc import opts
from imgprealloc import presence
from imgprealloc import qemu_img
from imgprealloc import service
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
    :param wants_restart: whether it is so only once nova-compute has been restarted
    """

    subject: str
    good: bool
    detail: str
    is_one_of_many: bool = False
    wants_restart: bool = False


def check(config_files: list[str], root: str = "/") -> Iterator[Finding]:
    """Look at Nova, how its service is started, qemu-img, the configuration and the filesystem.

    :param config_files: as for nova-compute's --config-file; none: what this
        host's nova-compute was started with, or would be
    :param root: where this host's /proc and services are looked for
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
    services = service.running(root) or [*filter(None, [service.configured(root)])]
    meant = _meant(services, config_files)
    with meant.surroundings():
        try:
            conf(list(meant.configuration), project="nova", prog=meant.prog)
            opts.register(conf)
            opts.validate(conf)
        except (cfg.Error, ValueError) as exc:
            yield Finding("configuration", False, str(exc))
            return
        files = meant.files_read(conf)
        yield Finding("configuration", True, ", ".join(files or ["no file: all defaults"]))
        yield _service(services, meant, [other.files_read(conf) for other in services], files)
        yield from _restart(meant, files)
        # Not earlier: see the module.
        from imgprealloc import seams
        import imgprealloc.nova as integration

        for seam in seams.compared():
            yield Finding(seam.name, seam.fault is None, seam.fault or "as expected", is_one_of_many=True)
        yield _driver(conf, integration, files)
        yield _switch(conf, integration, files)
        yield _backend(conf)
        yield _qemu_img()
        yield from _given_back(conf)
        yield _instances_path(conf)


def _meant(services: list[service.Invocation], config_files: list[str]) -> service.Invocation:
    """Return the invocation whose configuration is looked at.

    :param config_files: what the caller has named, which counts more than what is found
    """
    found = services[0] if services else service.Invocation()
    if not config_files:
        return found
    named = tuple(f"--config-file={os.path.abspath(file)}" for file in config_files)
    return dataclasses.replace(found, arguments=named, unknown="")


def _service(
    services: list[service.Invocation], meant: service.Invocation, read: list[list[str]], files: list[str]
) -> Finding:
    """Tell who starts nova-compute with what, and whether that is what is looked at here.

    :param read: the files that each of the services has read
    :param files: those that are looked at
    """
    if not services:
        return Finding(
            "nova-compute", True, "no service of it is here; Nova's own places are looked at for its configuration"
        )
    if meant.unknown:
        return Finding("nova-compute", False, meant.unknown)
    theirs, ours = (service.environment_of(python) for python in (meant.python or sys.executable, sys.executable))
    if theirs != ours:
        way_out = f"run {theirs}/bin/imgprealloc, or install imgprealloc there"
        return Finding(
            "nova-compute", False, f"{meant.told_by}: its Python is that of {theirs}, this one of {ours}; {way_out}"
        )
    others = [
        f"{other.told_by} reads {', '.join(found) or 'no file'}"
        for other, found in zip(services, read)
        if found != files and not other.unknown
    ]
    is_chosen = meant.arguments != services[0].arguments
    if others and not (is_chosen and files in read):
        way_out = "do without --config-file" if is_chosen else "name one's files with --config-file"
        return Finding("nova-compute", False, f"{'; '.join(others)}, and that is not what is looked at here; {way_out}")
    words = shlex.join(meant.configuration) or "no word on its configuration"
    if meant.pid is None:
        return Finding("nova-compute", True, f"does not run; {meant.told_by} starts it with {words}")
    return Finding("nova-compute", True, f"{meant.told_by}, started with {words}")


def _restart(meant: service.Invocation, files: list[str]) -> Iterator[Finding]:
    """Tell of a nova-compute that runs with what has been changed since; mode and owner of a file are no change."""
    if meant.started is None:
        return
    changed = [file for file in files if os.stat(file).st_mtime > meant.started]
    # A package's files are older than their installation.
    if os.stat(__file__).st_ctime > meant.started:
        changed.append("imgprealloc itself")
    if changed:
        detail = f"{', '.join(changed)}: newer than {meant.told_by}; restart nova-compute"
        yield Finding("restart", True, detail, wants_restart=True)


def _set_by(files: list[str], name: str) -> str:
    """Return what an option of [DEFAULT] is set by: a variable, a file, or nothing at all."""
    variable = f"OS_DEFAULT__{name.upper()}"
    if variable in os.environ:
        return f"the environment ({variable})"
    for file in reversed(files):
        sections: dict[str, dict[str, list[str]]] = {}
        cfg.ConfigParser(file, sections).parse()
        if name in sections.get("DEFAULT", {}):
            return file
    return "default"


def _driver(conf: cfg.ConfigOpts, integration: types.ModuleType, files: list[str]) -> Finding:
    if integration.is_patched(conf.use_cow_images):
        patched = f"{conf.compute_driver}, and imagebackend is patched (contrib/), but not what the driver does itself"
        return Finding("compute_driver", True, patched)
    if conf.compute_driver != DRIVER:
        set_by = _set_by(files, "compute_driver")
        remedy = f"set [DEFAULT] compute_driver = {DRIVER}" + (" there" if set_by in files else "")
        return Finding("compute_driver", False, f"{conf.compute_driver}, by {set_by}; {remedy}")
    for module in ("nova.virt.imgprealloc", "nova.privsep.imgprealloc"):
        if importlib.util.find_spec(module) is None:
            return Finding(
                "compute_driver",
                False,
                f"{DRIVER}, but {module.replace('.', '/')}.py is not in Nova's package; "
                "install imgprealloc with pip into the environment, or folder, that Nova is installed in",
            )
    return Finding("compute_driver", True, DRIVER)


def _switch(conf: cfg.ConfigOpts, integration: types.ModuleType, files: list[str]) -> Finding:
    good = integration.is_on(conf)
    set_by = _set_by(files, "preallocate_images")
    remedy = "" if good else f", by {set_by}; set [DEFAULT] preallocate_images = space"
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
    if not presence.is_there(path):
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
