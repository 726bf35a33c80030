# SPDX-License-Identifier: Apache-2.0
"""qemu-img, one function a sub-command. Nothing else calls it.

Formats are always named, output is JSON, and what reads an image runs under
limits, because its content may be a guest's. What to do with the answers is
decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
import functools
import json
import os
import re
import stat
from typing import Any

from oslo_concurrency import processutils
from oslo_utils import units

from imgprealloc import command
from imgprealloc import exceptions

# Nova's own for qemu-img info, and that it writes no more than what it may print.
LIMITS = processutils.ProcessLimits(cpu_time=30, address_space=units.Gi, file_size=command.MOST_PRINTED)

# A check of 1 TiB takes 0.5 s and 25 MB, but also, by chance, up to 64 threads
# with stacks of 8 MiB, for which 1 GiB was too little in 1 of some 500 checks.
CHECK_LIMITS = processutils.ProcessLimits(cpu_time=30, address_space=2 * units.Gi, file_size=command.MOST_PRINTED)

# Subclusters (extended_l2) and growth that hides a longer backing file.
OVERLAY_PREALLOCATION = (5, 2)

# 2: the image is corrupt, 3: it has leaked clusters. Both come with JSON.
_CHECK_ANSWERS = (0, 2, 3)


def version(path: str = "qemu-img") -> tuple[int, ...]:
    """Return qemu-img's version, as numbers.

    :param path: the disk that it is asked for, for the error's text
    :raises: ProgramMissing, ProgramKilled, CommandFailed, QemuImgTooOld if it
        prints none
    """
    try:
        return _version()
    except exceptions.PreallocationError as exc:
        exc.path = path
        raise


def forget() -> None:
    """Ask for everything once more, as a new process would."""
    _version.cache_clear()
    _measure.cache_clear()


@functools.cache
def _version() -> tuple[int, ...]:
    said = command.run("qemu-img", "qemu-img", "--version")
    found = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", said)
    if found is None:
        raise exceptions.QemuImgTooOld(
            "qemu-img", f"qemu-img prints no version: {said[:200]!r}", "Install QEMU 5.2 or later."
        )
    return tuple(int(number) for number in found.groups(default="0"))


def create(
    path: str,
    name: str,
    size: int,
    format: str,
    options: Mapping[str, str],
    *,
    backing_file: str | None = None,
    backing_format: str | None = None,
) -> None:
    """Create an image; qemu-img truncates what is there without a word, and does not look for the backing file."""
    backing = [] if backing_file is None else ["-u", "-b", backing_file, "-F", str(backing_format)]
    command.run(
        path, "qemu-img", "create", "-q", "-f", format, *backing, *_options(options), name, str(size), work=size
    )  # fmt: skip


def convert(
    path: str,
    name: str,
    target: str,
    size: int,
    format: str,
    options: Mapping[str, str],
    *,
    backing_file: str | None = None,
    backing_format: str | None = None,
) -> None:
    """Copy an image into a new one of the same format, over the same backing file.

    Over a backing file with -S 0: otherwise qemu-img gives back the clusters
    that hold zeros. The price is that zeros are written beyond its end.

    :param size: the virtual size, in bytes
    :param backing_file: its absolute path, which the new header gets too
    """
    if backing_file is None:
        source = ["-f", format, "-O", format, *_options(options), name]
    else:
        backing = ["-B", backing_file, "-F", str(backing_format)]
        image = _image(name, format, backing_file, str(backing_format))
        source = ["-S", "0", "--image-opts", "-O", format, *backing, *_options(options), image]
    command.run(path, "qemu-img", "convert", "-q", *source, target, work=2 * size)


def rename_backing_file(path: str, name: str, backing_file: str, backing_format: str) -> None:
    """Write another name of the same backing file into a qcow2 header; neither is opened."""
    command.run(path, "qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", backing_file, "-F", backing_format, name)


def resize(
    path: str,
    name: str,
    size: int,
    format: str,
    preallocation: str,
    *,
    backing_file: str | None = None,
    backing_format: str | None = None,
) -> None:
    """Grow an image; qemu-img refuses to shrink it without being told so.

    :param backing_file: its absolute path, where the header has a relative one
    """
    image = ["-f", format, f"--preallocation={preallocation}", name]
    if backing_file is not None:
        opened = _image(name, format, backing_file, str(backing_format))
        image = ["--image-opts", f"--preallocation={preallocation}", opened]
    command.run(path, "qemu-img", "resize", "-q", *image, str(size), work=size)


def resize_over_zeros(path: str, name: str, size: int, zeros: str, preallocation: str, *, flush: bool = True) -> None:
    """Grow a qcow2 overlay as if its backing file were zeros, a sparse file of size bytes.

    QEMU then has a backing file to hide from the new part, and marks its
    subclusters allocated instead of only mapping them (qcow2.c,
    subclusters_need_allocation). The header keeps the true backing file.
    The old size must be a multiple of the cluster size: in a cluster that is
    there already, the zeros would come instead of the true backing file's tail.

    :param flush: whether each step has to be on stable storage before the
        next, as for a disk that must survive a crash half way; 40 GiB take
        0.13 s with it, 0.05 s without
    """
    caching = {} if flush else {"cache.no-flush": "on", "file.cache.no-flush": "on"}
    image = _image(name, "qcow2", zeros, "raw", **caching)
    command.run(
        path, "qemu-img", "resize", "-q", "--image-opts", f"--preallocation={preallocation}", image, str(size),
        work=size,
    )  # fmt: skip


def info(path: str, name: str, format: str | None = None) -> dict[str, Any]:
    """Describe an image's header, also while it is in use. No format: detect it."""
    named = [] if format is None else ["-f", format]
    return _json(path, command.run(path, "qemu-img", "info", "-U", "--output=json", *named, name, limits=LIMITS))


def check(path: str, name: str, format: str) -> dict[str, Any]:
    """Count an image's clusters, and its faults, also while it is in use.

    Its backing file is not opened, which a header may place anywhere: a check
    would wait for a pipe or a server for ever, and needs neither.
    """
    image = "json:" + json.dumps({"driver": format, "backing": None, "file": {"driver": "file", "filename": name}})
    said = command.run(
        path, "qemu-img", "check", "-U", "--output=json", "-f", format, image,
        limits=CHECK_LIMITS, exit_codes=_CHECK_ANSWERS,
    )  # fmt: skip
    return _json(path, said)


def repair(path: str, name: str) -> None:
    """Mend the refcounts of a qcow2 image; what a guest reads stays. Its backing file is not opened."""
    image = "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": name}})
    command.run(path, "qemu-img", "check", "-q", "-r", "all", "-f", "qcow2", image, exit_codes=(0, 1, 2, 3))


def measure(path: str, size: int, format: str, options: Mapping[str, str]) -> int:
    """Return the bytes that a new image of size needs with everything allocated.

    :param path: the disk that it is asked for, for the error's text
    :raises: BrokenImage, ProgramMissing, ProgramKilled, CommandFailed
    """
    try:
        return _measure(size, format, tuple(options.items()))
    except exceptions.PreallocationError as exc:
        exc.path = path
        raise


# A host has few flavors, and so few shapes of disks.
@functools.lru_cache(maxsize=256)
def _measure(size: int, format: str, options: tuple[tuple[str, str], ...]) -> int:
    said = command.run(
        "qemu-img", "qemu-img", "measure", "--output=json", "-O", format, *_options(dict(options)), "--size", str(size)
    )
    return number("qemu-img", _json("qemu-img", said), "fully-allocated")


def value(path: str, answer: Mapping[str, Any], *keys: str) -> Any:
    """Return what an answer says under a key; a missing one is an error, not None.

    :raises: BrokenImage
    """
    found: Any = answer
    for key in keys:
        if not isinstance(found, Mapping) or key not in found:
            raise exceptions.BrokenImage(
                path, f"qemu-img's answer lacks {'.'.join(keys)!r}", "Check the image with qemu-img by hand."
            )
        found = found[key]
    return found


def count(path: str, answer: Mapping[str, Any], key: str) -> int:
    """Return a count that qemu-img leaves out where it is 0.

    :raises: BrokenImage
    """
    return number(path, answer, key) if key in answer else 0


def number(path: str, answer: Mapping[str, Any], *keys: str) -> int:
    """Return a count or a size out of an answer.

    :raises: BrokenImage
    """
    found = value(path, answer, *keys)
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise exceptions.BrokenImage(
            path, f"qemu-img's answer has {found!r} as {'.'.join(keys)!r}", "Check the image with qemu-img by hand."
        )
    return found


def _image(name: str, format: str, backing_file: str, backing_format: str, **more: str) -> str:
    """Describe an image over a backing file that we name, whatever its header says."""
    return _csv(
        {
            "driver": format,
            "file.driver": "file",
            "file.filename": name,
            **more,
            "backing.driver": backing_format,
            "backing.file.driver": "host_device" if _is_device(backing_file) else "file",
            "backing.file.filename": backing_file,
        }
    )


def _is_device(path: str) -> bool:
    # QEMU warns of a device that is opened as a file, and may refuse it.
    return stat.S_ISBLK(os.stat(path).st_mode)


def _options(options: Mapping[str, str]) -> list[str]:
    return ["-o", _csv(options)] if options else []


def _csv(options: Mapping[str, str]) -> str:
    """Join options; a comma within a value is doubled, or it would end it."""
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())


def _json(path: str, said: str) -> dict[str, Any]:
    try:
        answer = json.loads(said)
    except ValueError as exc:
        raise _unreadable(path, said) from exc
    if not isinstance(answer, dict):
        raise _unreadable(path, said)
    return answer


def _unreadable(path: str, said: str) -> exceptions.BrokenImage:
    return exceptions.BrokenImage(
        path, f"qemu-img printed no JSON that can be read: {said[:200]!r}", "Check the image with qemu-img by hand."
    )
