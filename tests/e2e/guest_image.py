# SPDX-License-Identifier: Apache-2.0
"""What the guest boots from: Debian's kernel, a ramdisk of busybox and whole_disk.c, and a small raw image.

The kernel is the one installed by linux-image-cloud-amd64, or else is
unpacked from that package without installing it.
"""

from __future__ import annotations

import dataclasses
import gzip
import lzma
import os
import pathlib
import re
import shutil
import stat
import subprocess

_HERE = pathlib.Path(__file__).parent

_KERNEL_PACKAGE = "linux-image-cloud-amd64"

# What a kernel has built in is not there as a file.
_MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")

# What a guest does to a filesystem; busybox has not all of it.
_PROGRAMS = ("mke2fs", "fallocate", "fstrim")

# Ends within a cluster of any size.
ROOT_IMAGE_SIZE = (24 << 20) + 1536

TOOLS = ("gcc", "busybox", *_PROGRAMS)


@dataclasses.dataclass(frozen=True)
class GuestImage:
    """Three files as for Glance, in a folder, and the program that writes and checks disks."""

    directory: pathlib.Path

    @property
    def kernel(self) -> pathlib.Path:
        return self.directory / "kernel"

    @property
    def ramdisk(self) -> pathlib.Path:
        return self.directory / "ramdisk"

    @property
    def root(self) -> pathlib.Path:
        return self.directory / "root"

    @property
    def whole_disk(self) -> pathlib.Path:
        return self.directory / "whole_disk"


def build(directory: pathlib.Path) -> GuestImage:
    """Make all that a guest needs in an empty folder."""
    image = GuestImage(directory)
    kernel, modules = _installed_kernel() or _unpacked_kernel(directory / "package")
    shutil.copyfile(kernel, image.kernel)
    _run("gcc", "-O2", "-fno-tree-vectorize", "-Wall", "-static", "-o", image.whole_disk, _HERE / "whole_disk.c")
    image.ramdisk.write_bytes(gzip.compress(_ramdisk(image.whole_disk, modules), compresslevel=1))
    with image.root.open("wb") as file:
        file.truncate(ROOT_IMAGE_SIZE)
    _run(image.whole_disk, "rewrite", image.root)
    return image


def _installed_kernel() -> tuple[pathlib.Path, pathlib.Path] | None:
    return _kernel_in(pathlib.Path("/"))


def _unpacked_kernel(directory: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    directory.mkdir()
    depends = _run("apt-cache", "depends", "--important", _KERNEL_PACKAGE)
    package = next(line.split()[-1] for line in depends.splitlines() if "Depends: linux-image-" in line)
    _run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package, cwd=directory)
    _run("dpkg-deb", "-x", next(directory.glob("*.deb")), directory)
    found = _kernel_in(directory)
    if found is None:
        raise RuntimeError(f"{package} has no kernel in it")
    return found


def _kernel_in(root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path] | None:
    """Find the newest of the kernels for virtual machines below a folder, and its modules."""
    for kernel in sorted(root.glob("boot/vmlinuz-*-cloud-amd64"), key=lambda path: path.stat().st_mtime, reverse=True):
        release = kernel.name.partition("-")[2]
        for modules in (root / "lib/modules" / release, root / "usr/lib/modules" / release):
            if modules.is_dir():
                return kernel, modules
    return None


def _ramdisk(writer: pathlib.Path, modules: pathlib.Path) -> bytes:
    busybox = shutil.which("busybox")
    if busybox is None or subprocess.run(["ldd", busybox], capture_output=True, check=False).returncode == 0:
        raise RuntimeError("busybox has to do without libraries in the guest; install busybox-static")
    archive = _Archive()
    for directory in ("bin", "dev", "mnt", "modules", "proc", "programs", "sys"):
        archive.add(directory, b"", stat.S_IFDIR | 0o755)
    archive.add("bin/busybox", pathlib.Path(busybox).read_bytes())
    for program in _PROGRAMS:
        path = str(shutil.which(program))
        archive.add(f"programs/{program}", pathlib.Path(path).read_bytes())
        for library in re.findall(r"(/\S+) \(0x", _run("ldd", path)):
            archive.add_with_folders(pathlib.Path(library))
    archive.add("whole_disk", writer.read_bytes())
    archive.add("init", (_HERE / "guest_init.sh").read_bytes())
    order: dict[str, bytes] = {}
    for name in _MODULES:
        _add_module(modules, name, order)
    for name, content in order.items():
        archive.add(f"modules/{name}", content)
    archive.add("modules/order", "".join(f"{name}\n" for name in order).encode())
    return archive.content()


def _add_module(modules: pathlib.Path, name: str, order: dict[str, bytes]) -> None:
    """Add a module after those that it needs, which it names itself."""
    for path in modules.rglob(f"{name}.ko*"):
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        needs = re.search(rb"\0depends=([^\0]*)\0", content)
        for needed in needs[1].decode().split(",") if needs else ():
            if needed and needed not in order:
                _add_module(modules, needed, order)
        order[name] = content


class _Archive:
    """A cpio archive as the kernel reads it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._files = 0

    def add(self, name: str, data: bytes, mode: int = stat.S_IFREG | 0o755) -> None:
        self._files += 1
        path = name.encode() + b"\0"
        fields = (self._files, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts += (_padded(header + path), _padded(data))

    def add_with_folders(self, path: pathlib.Path) -> None:
        """Add a file of this machine's in the place where it is here."""
        for folder in reversed(path.relative_to("/").parents[:-1]):
            self.add(str(folder), b"", stat.S_IFDIR | 0o755)
        self.add(str(path.relative_to("/")), path.read_bytes())

    def content(self) -> bytes:
        self.add("TRAILER!!!", b"", 0)
        return b"".join(self._parts)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _run(*argv: str | os.PathLike[str], cwd: pathlib.Path | None = None) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, argv))}: {done.stderr.strip()}")
    return done.stdout
