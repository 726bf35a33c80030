# SPDX-License-Identifier: Apache-2.0
"""qemu-img, one function a sub-command. Nothing else calls it.

Formats are always named, output is JSON, and what reads an image runs under
limits, because its content may be a guest's. What to do with the answers is
decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
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
from imgprealloc import pace
from imgprealloc import progress

# Nova's own for qemu-img info, and that it writes no more than what it may print.
LIMITS = processutils.ProcessLimits(cpu_time=30, address_space=units.Gi, file_size=command.MOST_PRINTED)

# A check of 1 TiB takes 0.5 s and 25 MB, but also, by chance, up to 64 threads
# with stacks of 8 MiB, for which 1 GiB was too little in 1 of some 500 checks.
CHECK_LIMITS = processutils.ProcessLimits(cpu_time=30, address_space=2 * units.Gi, file_size=command.MOST_PRINTED)

# Subclusters (extended_l2) and growth that hides a longer backing file.
OVERLAY_PREALLOCATION = (5, 2)

# convert -r.
RATE_LIMIT = (5, 2)

# The create option for XFS.
EXTENT_SIZE_HINT = (5, 1)

# discard=ignore stops WRITE ZEROES with unmap, too (QEMU's commit d05ae948cc88).
KEEPS_ZEROED_SPACE = (9, 1)

# Clusters in one answer of qemu-img map, of some 130 bytes each at the most.
_MAPPED_AT_ONCE = 4096
# Orders in one call of qemu-io; a command line ends at 2 MiB.
_ORDERS_AT_ONCE = 1000
# Bytes, for which qemu-io takes memory.
_READ_AT_ONCE = 4 * units.Mi

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


@functools.cache
def _version() -> tuple[int, ...]:
    # Under limits, so that whatever a look needs is missed here already.
    said = command.run("qemu-img", "qemu-img", "--version", limits=LIMITS)
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
        path, "qemu-img", "create", "-q", "-f", format, *backing, *_options(options), name, str(size),
        work=size, told=progress.allocated(name, size),
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
    that hold zeros. The price is that what was only marked as zeros is written
    up to the backing file's end; see mark_zeros().

    :param size: the virtual size, in bytes
    :param backing_file: its absolute path, which the new header gets too
    """
    if backing_file is None:
        source = ["-f", format, "-O", format, *_options(options), name]
        _convert(path, size, {"-t": target, "-T": name}, *source, target)
    else:
        source = _over_backing(name, format, options, backing_file, str(backing_format))
        _convert(path, size, {"-t": target}, "-S", "0", *source, target)


def convert_thin(
    path: str,
    name: str,
    target: str,
    size: int,
    options: Mapping[str, str],
    *,
    backing_file: str,
    backing_format: str,
) -> None:
    """Copy a qcow2 overlay as convert() does, without the clusters that hold zeros."""
    source = _over_backing(name, "qcow2", options, backing_file, backing_format)
    _convert(path, size, {"-t": target}, *source, target)


def _over_backing(
    name: str, format: str, options: Mapping[str, str], backing_file: str, backing_format: str
) -> list[str]:
    # Not -F, which convert has from QEMU 6.0 on.
    chosen = _options({**options, "backing_fmt": backing_format})
    image = _csv(_over(name, format, backing_file, backing_format))
    return ["--image-opts", "-O", format, "-B", backing_file, *chosen, image]


def copy_in(
    path: str, name: str, format: str, target: str, size: int, options: Mapping[str, str], **backing: str
) -> None:
    """Make a qcow2 image with all that another one reads as, zeros too, whatever that has it from.

    Without a backing file: over one, qemu-img leaves out what the other has from its own.

    :param size: the virtual size, in bytes; not more than the other has
    :param backing: the other's backing_file, by its absolute path, and
        backing_format, where its header is not to be asked
    """
    source = _csv(_part(_image(name, format, backing), 0, size))
    _convert(path, size, {"-t": target}, "-S", "0", "--image-opts", "-O", "qcow2", *_options(options), source, target)


def copy_tail(
    path: str, name: str, target: str, start: int, end: int, *, backing_file: str, backing_format: str
) -> None:
    """Copy a part of a qcow2 overlay into another one over the same backing file, which reads as zeros there.

    :param start: in bytes, as is end
    """
    images = (_over(name, "qcow2", backing_file, backing_format), _over(target, "qcow2", backing_file, backing_format))
    _convert_part(path, *images, start, end, {"-t": target}, "--target-is-zero")


def copy_out(path: str, name: str, target: str, start: int, end: int, **backing: str) -> None:
    """Copy what a part of a qcow2 disk reads as to the same place in a raw file that has nothing there.

    :param start: in bytes, as is end
    :param backing: as for copy_in()
    """
    images = (_image(name, "qcow2", backing), _alone(target, "raw"))
    _convert_part(path, *images, start, end, {"-t": target}, "--target-is-zero")


def copy_back(path: str, source: str, name: str, start: int, end: int, **backing: str) -> None:
    """Write a part of a raw file to the same place in a qcow2 disk, as its guest would: zeros too, and flushed.

    With each write, because qemu-img does not tell of what fails as it closes the disk.

    :param start: in bytes, as is end
    :param backing: as for copy_in(), of the disk
    """
    images = (_alone(source, "raw"), _image(name, "qcow2", backing))
    _convert_part(path, *images, start, end, {}, "-S", "0", "-t", "writethrough")


def _convert_part(
    path: str,
    source: Mapping[str, str],
    target: Mapping[str, str],
    start: int,
    end: int,
    caches: Mapping[str, str],
    *how: str,
) -> None:
    """Copy a part of one image to the same place in another that is there; start and end are bytes."""
    opened = [_csv(_part(image, start, end - start)) for image in (source, target)]
    _convert(path, end - start, caches, "-n", *how, "--image-opts", "--target-image-opts", *opened)


def _convert(path: str, size: int, caches: Mapping[str, str], *argv: str) -> None:
    told = progress.printed(size)
    quiet = "-q" if told is None else "-p"
    command.run(path, "qemu-img", "convert", quiet, *_considerate(path, caches), *argv, work=2 * size, told=told)


def _considerate(path: str, caches: Mapping[str, str]) -> list[str]:
    """Say how a copy is made where a pace is to be kept.

    :param caches: the files that are to pass the page cache by, where their filesystem has that: of the target by -t,
        of the source by -T
    :raises: QemuImgTooOld
    """
    kept = pace.current()
    if kept is None:
        return []
    options = [word for cache, name in caches.items() if _takes_direct(name) for word in (cache, "none")]
    if kept.rate is None:
        return options
    if version(path) < RATE_LIMIT:
        raise exceptions.QemuImgTooOld(
            path,
            "this qemu-img cannot keep a rate as it copies (5.2 or later can)",
            "Nothing was changed; leave the rate out (--rate), or install QEMU 5.2 or later.",
        )
    return [*options, "-r", str(kept.rate)]


def _takes_direct(name: str) -> bool:
    try:
        os.close(os.open(name, os.O_RDONLY | os.O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def shrink(path: str, name: str, size: int, *, backing_file: str, backing_format: str) -> None:
    """Cut off the end of a qcow2 overlay; only ever of a new file of ours."""
    image = _csv(_over(name, "qcow2", backing_file, backing_format))
    command.run(path, "qemu-img", "resize", "-q", "--shrink", "--image-opts", image, str(size), work=size)


def zeros(
    path: str, name: str, cluster_size: int, end: int, *, backing_file: str, backing_format: str
) -> Iterator[tuple[int, int]]:
    """List what is marked as zeros in a qcow2 overlay, before its backing file's end: offset and length, in bytes.

    :param end: where to stop, at or before the end of the backing file
    """
    image = _csv(_over(name, "qcow2", backing_file, backing_format))
    # So that the answer stays below what is kept of it, however the clusters alternate.
    step = _MAPPED_AT_ONCE * cluster_size
    for start in range(0, end, step):
        answer = command.run(
            path, "qemu-img", "map", "--output=json", "--image-opts", f"--start-offset={start}",
            f"--max-length={min(step, end - start)}", image, limits=LIMITS,
        )  # fmt: skip
        try:
            stretches = json.loads(answer)
        except ValueError as exc:
            raise _unreadable(path, answer) from exc
        for stretch in stretches:
            marked = value(path, stretch, "zero") is True and value(path, stretch, "data") is False
            if marked and number(path, stretch, "depth") == 0:
                yield number(path, stretch, "start"), number(path, stretch, "length")


def mark_zeros(
    path: str, name: str, stretches: Iterable[tuple[int, int]], *, backing_file: str, backing_format: str
) -> None:
    """Mark stretches of a new qcow2 overlay as zeros; their clusters stay mapped.

    By qemu-io, which comes with qemu-img: qemu-img itself either gives the
    clusters back (QEMU before 9.1) or writes the zeros.

    :raises: CommandFailed also where one of them does not read as zeros; the
        overlay is worth nothing then
    """
    image = _csv(_over(name, "qcow2", backing_file, backing_format))
    orders: list[tuple[str, int]] = []
    for start, length in stretches:
        for position in range(start, start + length, _READ_AT_ONCE):
            piece = min(_READ_AT_ONCE, start + length - position)
            orders.append((f"read -q -P 0 {position} {piece}", piece))
        orders.append((f"write -q -z {start} {length}", 0))
    for first in range(0, len(orders), _ORDERS_AT_ONCE):
        batch = orders[first : first + _ORDERS_AT_ONCE]
        words = [word for order, _ in batch for word in ("-c", order)]
        command.run(path, "qemu-io", "--image-opts", *words, image, work=sum(piece for _, piece in batch))


def name_backing_file(path: str, name: str, backing_file: str, backing_format: str) -> None:
    """Write the name of a backing file into a qcow2 header; neither is opened."""
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
    grown: int = 0,
) -> None:
    """Grow an image; qemu-img refuses to shrink it without being told so.

    :param backing_file: its absolute path, where the header has a relative one
    :param grown: bytes that it is longer by afterwards
    """
    image = ["-f", format, f"--preallocation={preallocation}", name]
    if backing_file is not None:
        opened = _csv(_over(name, format, backing_file, str(backing_format)))
        image = ["--image-opts", f"--preallocation={preallocation}", opened]
    told = progress.allocated(name, grown)
    command.run(path, "qemu-img", "resize", "-q", *image, str(size), work=size, told=told)


def resize_over_zeros(
    path: str, name: str, size: int, zeros: str, preallocation: str, *, grown: int = 0, flush: bool = True
) -> None:
    """Grow a qcow2 overlay as if its backing file were zeros, a sparse file.

    If that has size bytes, QEMU has a backing file to hide from the new part, and
    marks its subclusters allocated instead of only mapping them (qcow2.c,
    subclusters_need_allocation). Where the old size is no multiple of the cluster
    size, it has to have there what the disk has in its last cluster: QEMU copies
    that, and zeros would come instead of the true backing file's. If it is empty
    there is nothing to hide, and what is new shows the true backing file; for an
    overlay that has just been made. The header keeps the true backing file in
    either case.

    :param grown: bytes that it is longer by afterwards
    :param flush: whether each step has to be on stable storage before the
        next, as for a disk that must survive a crash half way; 40 GiB take
        0.13 s with it, 0.05 s without
    """
    caching = {} if flush else {"cache.no-flush": "on", "file.cache.no-flush": "on"}
    image = _csv({**_over(name, "qcow2", zeros, "raw"), **caching})
    command.run(
        path, "qemu-img", "resize", "-q", "--image-opts", f"--preallocation={preallocation}", image, str(size),
        work=size, told=progress.allocated(name, grown),
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


def _alone(name: str, format: str) -> dict[str, str]:
    """Describe an image as QEMU finds it, with the backing files that its header names."""
    return {"driver": format, "file.driver": _protocol(name), "file.filename": name}


def _image(name: str, format: str, backing: Mapping[str, str]) -> dict[str, str]:
    """Describe an image, over the backing file that is named, if one is; else its header tells."""
    return _over(name, format, **backing) if backing else _alone(name, format)


def _over(name: str, format: str, backing_file: str, backing_format: str) -> dict[str, str]:
    """Describe an image over a backing file that we name, whatever its header says."""
    backing = _alone(backing_file, backing_format)
    return {
        "driver": format,
        "file.driver": "file",
        "file.filename": name,
        **{f"backing.{key}": value for key, value in backing.items()},
    }


def _part(image: Mapping[str, str], offset: int, size: int) -> dict[str, str]:
    """Describe a part of an image as an image; offset and size are bytes."""
    below = {f"file.{key}": value for key, value in image.items()}
    return {"driver": "raw", "offset": str(offset), "size": str(size), **below}


def _protocol(path: str) -> str:
    # QEMU warns of a device that is opened as a file, and may refuse it.
    return "host_device" if stat.S_ISBLK(os.stat(path).st_mode) else "file"


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
