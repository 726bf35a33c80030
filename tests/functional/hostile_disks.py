# SPDX-License-Identifier: Apache-2.0
"""Disks that a guest, a fault or a neighbour has made hostile: what there is, and how each is made.

Made by qemu-img, and then patched byte by byte. What must not happen to them is
in hostile_trials.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import functools
import json
import os
import pathlib
import random
import stat
import struct
import subprocess
import tempfile
from typing import Any, Literal, Optional

import images

KiB, MiB = 1 << 10, 1 << 20

# What the disks have, and what they are to grow to: no whole cluster of any size.
SIZE = 4 * MiB
GROWN = 20 * MiB + 512

# Where qcow2's header has its fields, and how long each is; docs/interop/qcow2.txt.
FIELDS = {
    "magic": (0, 4),
    "version": (4, 4),
    "backing file's offset": (8, 8),
    "backing file's length": (16, 4),
    "cluster bits": (20, 4),
    "size": (24, 8),
    "encryption": (32, 4),
    "L1 entries": (36, 4),
    "L1 offset": (40, 8),
    "refcount table's offset": (48, 8),
    "refcount table's clusters": (56, 4),
    "snapshots": (60, 4),
    "snapshots' offset": (64, 8),
    "incompatible features": (72, 8),
    "compatible features": (80, 8),
    "autoclear features": (88, 8),
    "refcount order": (96, 4),
    "header length": (100, 4),
}

# Where qemu-img create puts things, with clusters of 64 KiB.
REFCOUNT_TABLE, REFCOUNTS, L1, L2, DATA = (number * 64 * KiB for number in range(1, 6))

COPIED = 1 << 63

# No program of this house has any business there.
SECRET = "/etc/shadow"
# A FIFO, a file or a folder of this name is named by disks that are not to be believed.
BAIT = "bait"

# The one that expects nothing has to keep the disk as it is, or to do what it says.
Expected = Literal["works", "refused", "safe"]
Truth = Optional[Literal["raw", "qcow2"]]

Builder = Callable[[pathlib.Path], pathlib.Path]
# Makes what is beside a disk.
Beside = Callable[[pathlib.Path], object]
# Makes the bytes of a file, when they are wanted: nothing runs where the corpus is only counted.
Content = Callable[[], bytes]
later = functools.partial


@dataclasses.dataclass(frozen=True)
class Entry:
    """A hostile disk.

    :param build: makes it in an empty folder, and returns the path to call it by
    :param truth: its true format; None where there is no disk
    :param expected: of the verbs, told the true format: "works", "refused", or either, which is "safe"
    :param record: what disk.info says to whoever looks well; "unknown" where it is there and says nothing
    :param damaged: whether what QEMU reads is not all that can be had back from it
    :param declared: names in the folder that may be opened, too
    """

    name: str
    kind: str
    build: Builder
    truth: Truth
    expected: Expected = "safe"
    record: Optional[Literal["raw", "qcow2", "unknown"]] = None
    damaged: bool = False
    declared: tuple[str, ...] = ()


# Ingredients: the bytes of files, each made once.


@functools.cache
def noise(size: int, seed: str = "noise") -> bytes:
    """Return bytes that nothing else has, the same ones each time."""
    return random.Random(seed).randbytes(size)


def run(*argv: str | os.PathLike[str], cwd: str | os.PathLike[str] | None = None) -> None:
    """Run a program of QEMU's."""
    done = subprocess.run(argv, cwd=cwd, capture_output=True, check=False, timeout=60)
    # For LUKS it measures how fast the machine is, and gives up where that takes it no time.
    while done.returncode and b"accurate CPU usage" in done.stderr:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, check=False, timeout=60)
    if done.returncode:
        raise AssertionError(f"{argv} ended with {done.returncode}: {done.stderr!r}")


@functools.cache
def image(
    format: str,
    options: str = "",
    size: int = SIZE,
    commands: tuple[str, ...] = (),
    backing: Optional[str] = None,
    backing_format: str = "raw",
    then: tuple[tuple[str, ...], ...] = (),
) -> bytes:
    """Return an image as qemu-img creates it.

    :param commands: qemu-io's, for what is in it
    :param backing: is named, and need not be there
    :param then: what qemu-img does to it afterwards
    """
    with tempfile.TemporaryDirectory(prefix="imgprealloc-hostile-") as scratch:
        secret = ["--object", "secret,id=secret,data=abc"] if "secret" in options else []
        chosen = ["-o", options] if options else []
        run("qemu-img", "create", "-q", "-f", format, *secret, *chosen, "disk", str(size), cwd=scratch)
        if commands:
            words = [word for command in commands for word in ("-c", command)]
            run("qemu-io", "-f", format, *words, "disk", cwd=scratch)
        for words in (list(argv) for argv in then):
            run("qemu-img", *words, "disk", cwd=scratch)
        if backing is not None:
            run(
                "qemu-img", "rebase", "-q", "-u", "-f", format, "-b", backing, "-F", backing_format, "disk", cwd=scratch
            )
        return pathlib.Path(scratch, "disk").read_bytes()


WRITES = ("write -P 0x5a 1M 64k", "write -P 0xa5 3M 100k")


def qcow2(options: str = "", **more: Any) -> bytes:
    """Return a qcow2 image with data in two places."""
    return image("qcow2", options, **{"commands": WRITES, **more})


def blank(options: str = "", **more: Any) -> bytes:
    """Return a qcow2 image that nothing was written to."""
    return image("qcow2", options, **more)


@functools.cache
def bitmap(content: Content) -> bytes:
    """Return an image with a persistent dirty bitmap."""
    with tempfile.TemporaryDirectory(prefix="imgprealloc-hostile-") as scratch:
        path = put(pathlib.Path(scratch, "disk"), content())
        run("qemu-img", "bitmap", "-f", "qcow2", "--add", path, "changed")
        return path.read_bytes()


@functools.cache
def compressed(options: str = "") -> bytes:
    """Return a qcow2 image, all of whose data is compressed."""
    with tempfile.TemporaryDirectory(prefix="imgprealloc-hostile-") as scratch:
        pathlib.Path(scratch, "source").write_bytes(b"compress me " * (MiB // 12))
        chosen = ["-o", options] if options else []
        run("qemu-img", "convert", "-q", "-c", "-f", "raw", "-O", "qcow2", *chosen, "source", "disk", cwd=scratch)
        return pathlib.Path(scratch, "disk").read_bytes()


def patched(content: Content, *patches: tuple[int, bytes]) -> bytes:
    """Put other bytes in the places of some."""
    changed = bytearray(content())
    for offset, new in patches:
        if len(changed) < offset:
            changed.extend(bytes(offset - len(changed)))
        changed[offset : offset + len(new)] = new
    return bytes(changed)


def field(name: str, value: int) -> tuple[int, bytes]:
    """Return the patch that gives a field of qcow2's header a value."""
    offset, length = FIELDS[name]
    return offset, value.to_bytes(length, "big")


def number(value: int) -> bytes:
    """Return an entry of one of qcow2's tables."""
    return struct.pack(">Q", value)


def put(path: pathlib.Path, content: bytes) -> pathlib.Path:
    """Write a file, with holes where there are zeros."""
    with open(path, "wb") as file:
        for start in range(0, len(content), 4 * KiB):
            block = content[start : start + 4 * KiB]
            if block.count(0) != len(block):
                file.seek(start)
                file.write(block)
        file.truncate(len(content))
    return path


def disk(content: Content, name: str = "disk") -> Builder:
    """Build one file."""
    return lambda folder: put(folder / name, content())


def with_(build: Builder, *more: Beside) -> Builder:
    """Build something beside it, first."""

    def built(folder: pathlib.Path) -> pathlib.Path:
        for other in more:
            other(folder)
        return build(folder)

    return built


def fifo(name: str = BAIT) -> Beside:
    """Build a FIFO, which nobody ever writes to."""
    return lambda folder: os.mkfifo(folder / name)


def beside(name: str, content: Content) -> Beside:
    """Build another file."""
    return lambda folder: put(folder / name, content())


def base(folder: pathlib.Path) -> None:
    """Build a raw base image."""
    put(folder / "base", noise(3 * MiB))


# Raw disks that a guest has written a header to.


def _cowd() -> bytes:
    """Return VMware's oldest sparse header, which qemu-img only reads."""
    sectors = SIZE // 512
    return b"COWD" + struct.pack("<IIIIIIIIII", 1, 3, sectors, 16, 4, 1, sectors, 64, 16, 63) + bytes(64 * KiB)


def _descriptor(extent: str) -> bytes:
    """Return VMware's text that names the file with the data."""
    text = (
        '# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="monolithicFlat"\n\n'
        f'RW {SIZE // 512} FLAT "{extent}" 0\n\nddb.adapterType = "ide"\n'
    )
    return text.encode().ljust(64 * KiB, b"\0")


def _embedded_descriptor() -> bytes:
    """Return a sparse vmdk, the text in which names a FIFO."""
    return patched(later(image, "vmdk"), (512, _descriptor(BAIT)[: 20 * 512]))


def _mbr() -> bytes:
    entry = struct.pack("<B3sB3sII", 0x80, b"\1\1\0", 0x83, b"\xfe\xff\xff", 8, SIZE // 512 - 8)
    return noise(446) + entry + bytes(48) + b"\x55\xaa" + bytes(7 * 512) + noise(4 * KiB)


HEADERS: dict[str, Content] = {
    "qcow2": qcow2,
    "blank qcow2": blank,
    "blank qcow2 of version 2": later(blank, "compat=0.10"),
    "preallocated qcow2": later(blank, "preallocation=metadata"),
    "vmdk": later(image, "vmdk", commands=WRITES),
    "vmdk of ESX": _cowd,
    "vmdk that is a text": later(_descriptor, "base"),
    "LUKS": later(image, "luks", "key-secret=secret,iter-time=10", MiB),
    "MBR": _mbr,
    "VHD": later(image, "vpc", commands=WRITES),
    "vdi": later(image, "vdi", commands=WRITES),
    "vhdx": later(image, "vhdx", commands=WRITES),
    "qed": later(image, "qed", commands=WRITES),
}

# Those that a guess goes wrong with: what they name is opened, or waited for.
LURES: dict[str, Content] = {
    "qcow2 over the host's secrets": later(blank, backing=SECRET),
    "qcow2 over a FIFO": later(blank, backing=BAIT),
    "qcow2 with data over a FIFO": later(qcow2, backing=BAIT),
    "qcow2 with a FIFO as its data": later(blank, f"data_file={BAIT},data_file_raw=on"),
    "vmdk that is a text and names a FIFO": later(_descriptor, BAIT),
    "vmdk that is a text and names the host's secrets": later(_descriptor, SECRET),
    "vmdk that names a FIFO": _embedded_descriptor,
    "qcow2 over a server": later(blank, backing="nbd://127.0.0.1:1/export"),
    "qcow2 over itself": later(blank, backing="disk", backing_format="qcow2"),
    "qed over the host's secrets": later(image, "qed", backing=SECRET),
}


def _whole(header: Content) -> bytes:
    return header().ljust(-(-len(header()) // 512) * 512, b"\0")


def _more(header: Content) -> bytes:
    return _whole(header) + bytes(MiB) + noise(64 * KiB)


def _less(header: Content) -> bytes:
    return header()[: max(len(header()) * 6 // 10 // 512, 1) * 512]


def _trailed(*, behind: bytes = b"") -> bytes:
    """Return a disk with the only mark of a fixed VHD, its footer."""
    return noise(64 * KiB) + bytes(SIZE - 64 * KiB) + image("vpc", "subformat=fixed")[-512:] + behind


def _raw_disks() -> Iterator[Entry]:
    def entry(name: str, content: Content, *more: Beside) -> Entry:
        return Entry(f"raw {name}", "raw", with_(disk(content), *more), "raw", "works")

    for name, header in HEADERS.items():
        yield entry(f"with {name} that ends with it", later(_whole, header))
        if name not in ("blank qcow2 of version 2", "preallocated qcow2"):
            yield entry(f"with {name} that ends before it", later(_more, header))
            yield entry(f"with {name} that ends beyond it", later(_less, header))
    for name, header in LURES.items():
        yield entry(f"with {name}", later(_whole, header), fifo())
    for name in ("qcow2 over a FIFO", "vmdk that is a text and names a FIFO"):
        yield entry(f"with {name} that ends before it", later(_more, LURES[name]), fifo())
    yield entry("with VHD as its trailer", _trailed)
    yield entry("with VHD before its last sectors", later(_trailed, behind=noise(4 * KiB)))
    yield entry("of an odd length with qcow2", lambda: qcow2() + noise(100))
    yield entry("of an odd length", lambda: noise(64 * KiB) + bytes(MiB) + noise(1))
    yield entry("of no length", bytes)
    yield entry("of a byte", lambda: b"Q")
    yield entry("of qcow2's magic alone", lambda: b"QFI\xfb")
    yield entry("with qcow2 of version 4", later(patched, qcow2, field("version", 4)))
    yield entry("with qcow2 of 2^63-1 bytes", later(patched, blank, field("size", 2**63 - 1)))


# qcow2 that is well, in all its kinds.

KEPT = (("snapshot", "-c", "kept"),)
_LUKS = "encrypt.format=luks,encrypt.key-secret=secret,encrypt.iter-time=10"
_SUBCLUSTERS = "extended_l2=on,cluster_size=128k"


def _sound_disks() -> Iterator[Entry]:
    def entry(name: str, content: Content, *more: Beside, declared: str = "", **fields: Any) -> Entry:
        fields = {"expected": "works", "declared": (declared,) if declared else (), **fields}
        return Entry(f"qcow2 {name}", "sound", with_(disk(content), *more), "qcow2", **fields)

    for size in ("512", "4k", "64k", "2M"):
        yield entry(f"with clusters of {size}", later(qcow2, f"cluster_size={size}"))
        yield entry(f"with clusters of {size}, blank", later(blank, f"cluster_size={size}"))
    for bits in (1, 4, 8, 64):
        yield entry(f"with refcounts of {bits} bits", later(qcow2, f"refcount_bits={bits}"))
    yield entry("of version 2", later(qcow2, "compat=0.10"))
    yield entry("of version 2, blank", later(blank, "compat=0.10"))
    yield entry("with lazy refcounts", later(qcow2, "lazy_refcounts=on"))
    yield entry("preallocated", later(qcow2, "preallocation=falloc"))
    yield entry("with zeroed clusters", later(qcow2, commands=(*WRITES, "write -z 1M 64k", "write -z -u 2M 64k")))
    for name, made in {"blank": blank, "with data": qcow2}.items():
        over_base = later(made, backing="base")
        yield entry(f"over a base, {name}", over_base, base, declared="base")
        yield entry(
            f"of version 2 over a base, {name}", later(made, "compat=0.10", backing="base"), base, declared="base"
        )
        content = later(made, _SUBCLUSTERS, backing="base")
        yield entry(f"with subclusters over a base, {name}", content, base, declared="base")
        content = later(made, backing="base", backing_format="qcow2")
        yield entry(
            f"over qcow2, {name}",
            content,
            beside("base", later(qcow2, size=3 * MiB, commands=WRITES[:1])),
            declared="base",
        )
    yield entry(
        "shorter than its base", later(qcow2, size=2 * MiB, commands=WRITES[:1], backing="base"), base, declared="base"
    )
    lure = beside("base", later(blank, backing=SECRET))
    yield entry("over a raw base that begins like qcow2", later(blank, backing="base"), lure, declared="base")
    yield entry("with compressed clusters", compressed)
    if images.knows_zstd():
        yield entry("with zstd", later(compressed, "compression_type=zstd"))
    yield entry("with a snapshot", later(qcow2, then=KEPT), expected="safe")
    yield entry("with a snapshot of nothing", later(blank, then=KEPT), expected="safe")
    yield entry("of version 2 with a snapshot", later(qcow2, "compat=0.10", then=KEPT), expected="safe")
    yield entry("with a bitmap", later(bitmap, qcow2), expected="safe")
    yield entry("with a bitmap of nothing", later(bitmap, blank), expected="safe")
    yield entry("that is encrypted", later(image, "qcow2", _LUKS), expected="safe", damaged=True)
    yield entry("with a header of AES", later(patched, qcow2, field("encryption", 1)), expected="safe", damaged=True)
    for length in (0, 512, MiB + 512):
        yield entry(f"of {length} bytes", later(blank, size=length), expected="works" if length else "safe")
    for length in (1, SIZE - 1, 2**63 - 1, 2**63 - 512, 2**64 - 1):
        content = later(patched, blank, field("size", length))
        yield entry(f"whose header says {length} bytes", content, expected="safe", damaged=True)


# qcow2 whose backing file, or data file, is not to be had, or not to be asked.

PROTOCOLS = (
    "nbd://127.0.0.1:1/export",
    "nbd:unix:/nonexistent",
    'json:{"driver":"null-co","size":4194304}',
    f'json:{{"driver":"file","filename":"{SECRET}"}}',
    "json:{}",
    "http://127.0.0.1:1/base",
    "ftp://127.0.0.1:1/base",
    "rbd:pool/base",
    "ssh://127.0.0.1:1/base",
    "iscsi://127.0.0.1:1/target/0",
    "fat:/nonexistent",
    "blkdebug::disk",
    "null-co://",
    "nosuch:base",
)


def device(path: pathlib.Path) -> None:
    """Build what reads as zeros without end."""
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))


def socket(path: pathlib.Path) -> None:
    """Build a socket that nobody listens at."""
    os.mknod(path, stat.S_IFSOCK | 0o600)


def _linked_fifo(folder: pathlib.Path) -> None:
    os.mkfifo(folder / BAIT)
    os.symlink(BAIT, folder / "link")


PLACES: dict[str, tuple[str, Beside]] = {
    "itself": ("disk", lambda folder: None),
    "one that is over it": (
        "other",
        lambda folder: put(folder / "other", blank(backing="disk", backing_format="qcow2")),
    ),
    "a FIFO": (BAIT, lambda folder: os.mkfifo(folder / BAIT)),
    "a link to a FIFO": ("link", _linked_fifo),
    "a character device": (BAIT, lambda folder: device(folder / BAIT)),
    "/dev/zero": ("/dev/zero", lambda folder: None),
    "nothing": ("missing", lambda folder: None),
    "a folder": (BAIT, lambda folder: os.mkdir(folder / BAIT)),
    "a link to itself": (BAIT, lambda folder: os.symlink(BAIT, folder / BAIT)),
    "a socket": (BAIT, lambda folder: socket(folder / BAIT)),
}


def _without_format() -> bytes:
    content = blank(backing="base")
    return content.replace(b"\xe2\x79\x2a\xca", b"\x13\x37\x13\x37", 1)


def _with_nul() -> bytes:
    return blank(backing="base").replace(b"base", b"b\0se", 1)


def _backing_disks() -> Iterator[Entry]:
    def entry(name: str, content: Content, *more: Beside, declared: tuple[str, ...] = ()) -> Entry:
        return Entry(f"qcow2 over {name}", "backing", with_(disk(content), *more), "qcow2", declared=declared)

    for name in PROTOCOLS:
        yield entry(name, later(blank, backing=name))
    for name in ("nbd:unix:/nonexistent", "fat:/nonexistent", "null-co://"):
        yield entry(f"{name}, with data", later(qcow2, backing=name))
    for name, (backing, make) in PLACES.items():
        format = "qcow2" if backing in ("disk", "other") else "raw"
        content = later(blank, backing=backing, backing_format=format)
        yield entry(name, content, make, declared=(backing, BAIT))
    for name in ("itself", "a FIFO", "nothing"):
        backing, make = PLACES[name]
        content = later(qcow2, backing=backing, backing_format="qcow2")
        yield entry(f"{name}, with data", content, make, declared=(backing,))
    lure = beside("base", later(blank, backing=BAIT))
    yield entry("a base of no format that names a FIFO", _without_format, fifo(), lure, declared=("base",))
    over_lure = later(blank, backing="base", backing_format="qcow2")
    yield entry("a qcow2 base that is over a FIFO", over_lure, fifo(), lure, declared=("base", BAIT))
    yield entry("a base whose name has a NUL", _with_nul, base)
    data_files: dict[str, Beside] = {
        "a file": beside(BAIT, later(noise, SIZE)),
        "a FIFO": fifo(),
        "missing": lambda folder: None,
    }
    for what, make in data_files.items():
        for options in ("", ",data_file_raw=on"):
            content = later(blank, f"data_file={BAIT}{options}")
            name = f"qcow2 whose data file is {what}{options}"
            yield Entry(name, "backing", with_(disk(content), make), "qcow2", "refused", declared=(BAIT,))


# Damage. What is there can be had back by whoever mends the one thing that is wrong.

WRONG_FIELDS: dict[str, tuple[int, ...]] = {
    "version": (0, 4),
    "backing file's offset": (1, 2**64 - 1),
    "backing file's length": (1024,),
    "cluster bits": (8, 12, 22),
    "encryption": (3,),
    "L1 entries": (0, 0x2000000),
    "L1 offset": (0, SIZE),
    "refcount table's offset": (0, 2**62),
    "refcount table's clusters": (0, 2**32 - 1),
    "snapshots": (1, 2**32 - 1),
    "refcount order": (3, 7),
    "header length": (0, 105, 2**32 - 1),
}

WRONG_TABLES: dict[str, tuple[tuple[int, bytes], ...]] = {
    "snapshot table beyond the end": (field("snapshots", 1), field("snapshots' offset", 2**40)),
    "snapshot table in the L1 table": (field("snapshots", 3), field("snapshots' offset", L1)),
    "name of the backing file in the L1 table": (field("backing file's offset", L1), field("backing file's length", 8)),
    "refcount table of zeros": ((REFCOUNT_TABLE, bytes(64 * KiB)),),
    "refcounts beyond the end": ((REFCOUNT_TABLE, number(2**40)),),
    "refcounts of zeros": ((REFCOUNTS, bytes(64 * KiB)),),
    "refcounts of ones": ((REFCOUNTS, b"\xff" * 64),),
    "L1 table over the header": (field("L1 offset", 0),),
    "L1 table over the refcount table": (field("L1 offset", REFCOUNT_TABLE),),
    "L1 entry names the header": ((L1, number(COPIED)),),
    "L1 entry is not aligned": ((L1, number(COPIED | L2 | 512)),),
    "L1 entry is beyond the end": ((L1, number(COPIED | 2**40)),),
    "L1 entry has reserved bits": ((L1, number(COPIED | L2 | 1)),),
    "L1 table of zeros": ((L1, bytes(512)),),
    "L2 entries name one cluster": ((L2 + 8 * 20, number(COPIED | DATA)),),
    "L2 entry names the L2 table": ((L2, number(COPIED | L2)),),
    "L2 entry is not aligned": ((L2, number(COPIED | DATA | 512)),),
    "L2 entry is beyond the end": ((L2, number(COPIED | 2**50)),),
    "L2 entries are noise": ((L2, noise(512)),),
    "compressed cluster beyond the end": ((L2, number(1 << 62 | 2**40)),),
    "refcount of data is 0": ((REFCOUNTS + 2 * 5, bytes(2)),),
    "refcount of data is 9": ((REFCOUNTS + 2 * 5, b"\0\x09"),),
}


def _cut(content: Content, end: int) -> bytes:
    return content()[:end]


def _damage() -> Iterator[Entry]:
    def entry(name: str, content: Content) -> Entry:
        return Entry(f"damaged: {name}", "damage", disk(content), "qcow2", damaged=True)

    for bit in (8, 9, 16, 17, 19, 63):
        yield entry(f"bit {bit} of the L1 offset", later(patched, qcow2, field("L1 offset", L1 ^ 1 << bit)))
    for bit in (9, 17, 63):
        patch = field("refcount table's offset", REFCOUNT_TABLE ^ 1 << bit)
        yield entry(f"bit {bit} of the refcount table's offset", later(patched, qcow2, patch))
    for name, values in WRONG_FIELDS.items():
        for value in values:
            yield entry(f"{name} is {value:#x}", later(patched, qcow2, field(name, value)))
    for name, patches in WRONG_TABLES.items():
        yield entry(name, later(patched, qcow2, *patches))
    for name in ("refcount table of zeros", "refcounts beyond the end", "refcounts of zeros"):
        yield entry(f"{name}, blank", later(patched, blank, *WRONG_TABLES[name]))
    for name in ("refcount table's offset", "refcount table's clusters"):
        yield entry(f"{name} is 0, blank", later(patched, blank, field(name, 0)))
    for name, (start, _) in FIELDS.items():
        yield entry(f"ends at the header's {name}", later(_cut, qcow2, start))
    for name, end in {"refcount table": REFCOUNT_TABLE, "L1 table": L1, "L2 table": L2, "data": DATA}.items():
        yield entry(f"ends in the {name}", later(_cut, qcow2, end + 4))
    yield entry("ends at the L1 table, blank", later(_cut, blank, L1))
    yield entry("ends with the header, blank", later(_cut, blank, REFCOUNT_TABLE))


FEATURES = {
    "incompatible": {0: "dirty", 1: "corrupt", 2: "data file", 3: "compression", 4: "subclusters", 5: "?", 63: "?"},
    "compatible": {0: "lazy refcounts", 1: "?", 63: "?"},
    "autoclear": {0: "bitmaps", 1: "raw data file", 2: "?", 63: "?"},
}


def _features() -> Iterator[Entry]:
    for kind, bits in FEATURES.items():
        for bit, name in bits.items():
            for what, made in {"": qcow2, ", blank": blank}.items():
                if name == "?" and made is qcow2:
                    continue
                content = later(patched, made, field(f"{kind} features", 1 << bit))
                called = f"qcow2 with {kind} feature {bit} ({name}){what}"
                expected: Expected = "refused" if (kind, name) == ("incompatible", "?") else "safe"
                # With subclusters it is another disk, which QEMU reads without an error.
                yield Entry(called, "feature", disk(content), "qcow2", expected, damaged=name != "subclusters")


# What makes programs run, or print, without end.


@functools.cache
def _endless() -> bytes:
    """Return an image of 320 KiB, of which check has 67 million faults to tell.

    All of its 8192 L2 tables are one, and each of its 8192 entries is wrong.
    """
    entries = 64 * KiB // 8
    return patched(
        blank,
        field("size", entries * entries * 64 * KiB),
        field("L1 entries", entries),
        (L1, number(COPIED | L2) * entries),
        (L2, number(COPIED | DATA | 512) * entries),
    )


@functools.cache
def _crowded() -> bytes:
    """Return an image with so many snapshots that info prints megabytes of them."""
    snapshot = struct.pack(">QIHHIIQII", L1, 1, 1, 1, 0, 0, 0, 0, 0) + b"12"
    table = snapshot.ljust(48, b"\0") * 65536
    return patched(blank, field("snapshots", 65536), field("snapshots' offset", MiB), (MiB, table))


def _floods() -> Iterator[Entry]:
    yield Entry("qcow2 with 65536 snapshots", "flood", disk(_crowded), "qcow2", damaged=True)


# Not one of the others, because each look at it may take a program half a minute of CPU time.
ENDLESS = Entry("qcow2 whose check prints without end", "flood", disk(_endless), "qcow2", damaged=True)


# Names and links.

NAMES: dict[str, str | bytes] = {
    "blanks": " a  disk ",
    "commas": ",,a,,,b,",
    "an option": "disk,preallocation=off",
    "a colon": "nbd:disk",
    "json": 'json:{"driver":"null-co"}',
    "a leading dash": "-disk",
    "two leading dashes": "--help",
    "a newline": "a\ndisk",
    "a newline at its end": "disk\n",
    "a carriage return and an escape": "a\r\x1b[2Kdisk",
    "percent signs": "disk%20%s%(name)s",
    "quotes": 'it\'s "a" disk\\',
    "letters that are not ASCII": "disk-ä-磁碟",
    "bytes that are no UTF-8": b"disk-\xff\xfe",
    "255 bytes": "d" * 255,
    "244 bytes": "d" * 244,
    "a name like ours": "disk.imgprealloc",
    "a hidden name like ours": ".disk.imgprealloc",
}


# Those that a raw disk has as well.
HARD_NAMES = ("commas", "a colon", "json", "a newline", "bytes that are no UTF-8", "255 bytes", "a name like ours")


def _names() -> Iterator[Entry]:
    for what, name in NAMES.items():
        contents: dict[str, Content] = {"blank qcow2": blank, "raw": later(_more, blank)}
        for kind, content in contents.items():
            if kind == "raw" and what not in HARD_NAMES:
                continue
            truth: Truth = "raw" if kind == "raw" else "qcow2"
            expected: Expected = "safe" if len(os.fsencode(name)) > 235 else "works"
            yield Entry(f"{kind}, its name has {what}", "name", disk(content, os.fsdecode(name)), truth, expected)


def _dotted(content: Content) -> Builder:
    """Build LINK/../disk, which for the kernel is beside LINK's target, and by its letters beside LINK."""

    def built(folder: pathlib.Path) -> pathlib.Path:
        os.makedirs(folder / "far" / "away")
        put(folder / "far" / "disk", content())
        put(folder / "disk", blank())
        os.symlink("far/away", folder / "link")
        return pathlib.Path(f"{folder}/link/../disk")

    return built


def _linked(content: Content) -> Builder:
    def built(folder: pathlib.Path) -> pathlib.Path:
        os.mkdir(folder / "away")
        put(folder / "away" / "disk", content())
        os.symlink("away/disk", folder / "link")
        return folder / "link"

    return built


def _in_linked_folder(content: Content) -> Builder:
    def built(folder: pathlib.Path) -> pathlib.Path:
        os.mkdir(folder / "away")
        put(folder / "away" / "disk", content())
        os.symlink("away", folder / "link")
        return folder / "link" / "disk"

    return built


def _named_twice(content: Content) -> Builder:
    def built(folder: pathlib.Path) -> pathlib.Path:
        path = put(folder / "disk", content())
        os.link(path, folder / "second")
        return path

    return built


def _no_disk(make: Beside) -> Builder:
    def built(folder: pathlib.Path) -> pathlib.Path:
        make(folder / "disk")
        return folder / "disk"

    return built


def _links() -> Iterator[Entry]:
    ways: dict[str, Callable[[Content], Builder]] = {
        "a link": _linked,
        "LINK/../disk": _dotted,
        "in a folder that is a link": _in_linked_folder,
        "with a second name": _named_twice,
    }
    contents: dict[str, Content] = {"qcow2": qcow2, "blank qcow2": blank, "raw": later(_more, qcow2)}
    for how, build in ways.items():
        for kind, content in contents.items():
            yield Entry(f"{kind}, {how}", "link", build(content), "raw" if kind == "raw" else "qcow2")
    nothings: dict[str, Beside] = {
        "a link to nothing": lambda path: os.symlink("missing", path),
        "a link to itself": lambda path: os.symlink("disk", path),
        "a FIFO": os.mkfifo,
        "a folder": os.mkdir,
        "a device": device,
        "a socket": socket,
    }
    for name, make in nothings.items():
        yield Entry(f"no disk but {name}", "link", _no_disk(make), None, "refused")


# Whatever has the names of temporary files beside a disk.

NEIGHBOURS: dict[str, Beside] = {
    "a text": lambda path: put(path, b"Dear diary,\n"),
    "an empty file": lambda path: put(path, b""),
    "a raw disk": lambda path: put(path, noise(MiB)),
    "a qcow2 disk": lambda path: put(path, qcow2()),
    "a folder": os.mkdir,
    "a FIFO": os.mkfifo,
    "a hard link to the disk": lambda path: os.link(path.parent / "disk", path),
    "a hard link to the base": lambda path: os.link(path.parent / "base", path),
    "a link to the base": lambda path: os.symlink("base", path),
    "a link to nothing": lambda path: os.symlink("missing", path),
}


def _with_neighbour(name: str, make: Beside) -> Builder:
    def built(folder: pathlib.Path) -> pathlib.Path:
        base(folder)
        # Its growth takes a file of zeros beside it, its recreation a new disk.
        path = put(folder / "disk", blank(_SUBCLUSTERS, backing="base"))
        make(folder / name)
        return path

    return built


def _neighbours() -> Iterator[Entry]:
    old = ("a text", "a qcow2 disk", "a folder", "a FIFO")
    for name, kinds in {
        ".disk.imgprealloc": NEIGHBOURS,
        ".disk.imgprealloc-zeros": NEIGHBOURS,
        "disk.imgprealloc": old,
        "disk.imgprealloc-zeros": old,
    }.items():
        for kind in kinds:
            build = _with_neighbour(name, NEIGHBOURS[kind])
            yield Entry(f"{name} is {kind}", "neighbour", build, "qcow2", declared=("base",))


# Nova's record of the formats.


def _text(say: Callable[[pathlib.Path], str | bytes]) -> Beside:
    def make(path: pathlib.Path) -> None:
        said = say(path.parent)
        path.write_bytes(said.encode() if isinstance(said, str) else said)

    return make


def _noted(say: Callable[[pathlib.Path], object]) -> Beside:
    return _text(lambda folder: json.dumps(say(folder)))


def _unreadable(path: pathlib.Path) -> None:
    BY_NOVA(path)
    path.chmod(0)


BY_NOVA = _noted(lambda folder: {f"{folder}/disk": "raw"})

SAYS_RAW: dict[str, Beside] = {
    "is Nova's": BY_NOVA,
    "has a key with // in its path": _noted(lambda folder: {f"{folder.parent}//{folder.name}/disk": "raw"}),
    "has another folder's path": _noted(lambda folder: {"/var/lib/nova/instances/elsewhere/disk": "raw"}),
    "has a resized instance's path": _noted(lambda folder: {f"{folder}_resize/disk": "raw"}),
    "has a path with dots": _noted(lambda folder: {f"{folder}/../{folder.name}/./disk": "raw"}),
    "contradicts itself": _noted(lambda folder: {"/elsewhere/disk": "raw", f"{folder}/disk": "qcow2"}),
    "contradicts itself the other way": _noted(lambda folder: {f"{folder}/disk": "raw", "/elsewhere/disk": "qcow2"}),
    "has no permissions": _unreadable,
    "begins with blanks": _text(lambda folder: "\n\n  " + json.dumps({f"{folder}/disk": "raw"})),
}

SAYS_NOTHING: dict[str, Beside] = {
    "is empty": _text(lambda folder: ""),
    "is cut short": _text(lambda folder: json.dumps({f"{folder}/disk": "raw"})[:-3]),
    "is 100000 lists in lists": _text(lambda folder: "[" * 100000 + "]" * 100000),
    "is 100000 objects in objects": _text(lambda folder: '{"a": ' * 100000 + "1" + "}" * 100000),
    "has 5 MB": _noted(
        lambda folder: {f"{folder}/disk": "raw", **{f"/{index}/disk.eph0": "x" * 1000 for index in range(5000)}}
    ),
    "is a list": _noted(lambda folder: [f"{folder}/disk", "raw"]),
    "is a number": _text(lambda folder: "1" * 10000),
    "is null": _text(lambda folder: "null"),
    "is a text in quotes": _noted(lambda folder: "raw"),
    "has numbers for values": _noted(lambda folder: {f"{folder}/disk": 1}),
    "has null for a value": _noted(lambda folder: {f"{folder}/disk": None}),
    "has a list for a value": _noted(lambda folder: {f"{folder}/disk": ["raw"]}),
    "has a format there is not": _noted(lambda folder: {f"{folder}/disk": "rawish"}),
    "is no UTF-8": _text(lambda folder: b'{"\xff\xfe/disk": "raw"}'),
    "is NULs": _text(lambda folder: bytes(4096)),
    "is a folder": os.mkdir,
    "is a FIFO": os.mkfifo,
    "is a device": device,
    "is a link to nothing": lambda path: path.symlink_to("missing"),
    "is a link to itself": lambda path: path.symlink_to("disk.info"),
}


def _recorded(content: Content, record: Beside) -> Builder:
    def built(folder: pathlib.Path) -> pathlib.Path:
        record(folder / "disk.info")
        return put(folder / "disk", content())

    return built


def _records() -> Iterator[Entry]:
    def entry(name: str, content: Content, make: Beside, **fields: Any) -> Entry:
        return Entry(name, "record", _recorded(content, make), **{"expected": "works", **fields})

    for what, make in SAYS_RAW.items():
        yield entry(f"raw, disk.info {what}", blank, make, truth="raw", record="raw")
    yield entry("raw with data, disk.info is Nova's", later(_more, qcow2), BY_NOVA, truth="raw", record="raw")
    for what, make in SAYS_NOTHING.items():
        yield entry(f"raw, disk.info {what}", blank, make, truth="raw", record="unknown")
    for what in ("is empty", "is 100000 lists in lists", "is a list", "is a folder", "is a FIFO"):
        yield entry(f"qcow2, disk.info {what}", blank, SAYS_NOTHING[what], truth="qcow2", record="unknown")
    yield entry("qcow2 that Nova has made of raw", qcow2, BY_NOVA, truth="qcow2", record="raw", expected="safe")
    qcow2_by_nova = _noted(lambda folder: {f"{folder}/disk": "qcow2"})
    yield entry("qcow2, disk.info is Nova's", blank, qcow2_by_nova, truth="qcow2", record="qcow2")
    others = _noted(lambda folder: {f"{folder}/disk.eph0": "raw", f"{folder}/a.disk": "raw"})
    yield entry("raw, disk.info is of other disks", blank, others, truth="raw")


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Return the corpus; nothing of it is made yet."""
    parts = (
        _raw_disks, _sound_disks, _backing_disks, _damage, _features, _floods, _names, _links, _neighbours, _records
    )  # fmt: skip
    found = tuple(entry for part in parts for entry in part())
    assert len({entry.name for entry in found}) == len(found)
    return found
