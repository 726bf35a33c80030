# SPDX-License-Identifier: Apache-2.0
"""Nova's image backends make preallocated disks; qemu-img and the filesystem say so."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib
import subprocess
from typing import Any

import compute_host
import images
import loop_filesystem
from nova.virt.libvirt import driver
import nova_disks
from oslo_concurrency import processutils
from oslo_utils import units
import pytest

import imgprealloc
from imgprealloc import cluster_map
from imgprealloc import fallocate
from imgprealloc import qcow2_header
from imgprealloc import record
import imgprealloc.nova
from nova import exception

_4G = 4 * units.Gi


def _inspect(image: Any) -> imgprealloc.DiskImage:
    return imgprealloc.Preallocator().inspect(image.path, format=image.driver_format)


def _is_preallocated(image: Any, size: int) -> bool:
    found = _inspect(image)
    status = os.stat(image.path)
    checked = subprocess.run(["qemu-img", "check", "-q", image.path], check=False).returncode
    return (
        (found.state, found.shortfall, found.virtual_size) == ("preallocated", 0, size)
        and status.st_blocks * 512 >= status.st_size
        # raw has no checks
        and checked in ((0,) if found.format == "qcow2" else (63,))
    )


def _spoil(path: str) -> None:
    """Let a qcow2 disk's first L1 entry point into the middle of nowhere."""
    with open(path, "r+b") as file:
        file.seek(40)
        file.seek(int.from_bytes(file.read(8), "big"))
        file.write(b"\xff" * 8)


def _swap(target: str, **kwargs: Any) -> None:
    driver.LibvirtDriver._create_swap(target, **kwargs)


def _ephemeral(target: str, **kwargs: Any) -> None:
    driver.LibvirtDriver._create_ephemeral(target, fs_label="ephemeral0", os_type=None, **kwargs)


def test_new_overlay_is_preallocated_and_reads_like_its_base(disks: Callable[..., nova_disks.Disks], base: str) -> None:
    image = disks().spawn(base, _4G)

    assert _is_preallocated(image, _4G)
    assert images.reads_like(image.path, "qcow2", base, "raw")


def test_stock_overlay_is_not(disks: Callable[..., nova_disks.Disks], base: str) -> None:
    # The control: if this fails, Nova has been cured, and we are not needed.
    image = disks(preallocated=False).spawn(base, _4G)

    assert (_inspect(image).mapped_clusters, _inspect(image).state) == (0, "thin")


def test_second_cache_writes_nothing(disks: Callable[..., nova_disks.Disks], base: str) -> None:
    made = disks()
    image = made.spawn(base, _4G)
    before = images.identity(image.path)

    made.cache(image, base, _4G)

    assert images.identity(image.path) == before


def test_grown_overlay_is_preallocated_and_reads_the_same(disks: Callable[..., nova_disks.Disks], base: str) -> None:
    made = disks()
    image = made.spawn(base, _4G)
    stock = disks(preallocated=False, preallocate_images="none").spawn(base, _4G)
    for path in (image.path, stock.path):
        images.qemu_io(path, "write -P 7 3G 1M")

    made = disks()
    made.cache(made.image_at(image.path), base, 8 * units.Gi)

    assert _is_preallocated(image, 8 * units.Gi)
    assert images.reads_like(image.path, "qcow2", stock.path, "qcow2")


def test_new_raw_disk_is_preallocated_and_reads_like_its_base(
    disks: Callable[..., nova_disks.Disks], base: str
) -> None:
    image = disks().spawn(base, _4G, image_type="raw")

    assert _is_preallocated(image, _4G)
    assert images.reads_like(image.path, "raw", base, "raw")


def test_grown_raw_disk_is_preallocated(disks: Callable[..., nova_disks.Disks], base: str) -> None:
    made = disks()
    image = made.spawn(base, _4G, image_type="raw")

    made.cache(image, base, 8 * units.Gi)

    assert _is_preallocated(image, 8 * units.Gi)


def test_flat_disk_that_holds_qcow2_is_preallocated_as_qcow2(
    disks: Callable[..., nova_disks.Disks], base: str, tmp_path: pathlib.Path
) -> None:
    qcow2 = str(tmp_path / "base.qcow2")
    images.qcow2_of(qcow2, base, "-c")

    image = disks(force_raw_images=False).spawn(qcow2, units.Gi, image_type="raw")

    assert image.driver_format == "qcow2"
    assert _is_preallocated(image, units.Gi)
    assert images.reads_like(image.path, "qcow2", base, "raw")


@pytest.mark.parametrize("image_type", ["qcow2", "raw"])
def test_swap_disk_is_preallocated(disks: Callable[..., nova_disks.Disks], image_type: str) -> None:
    made = disks()
    image = made.image(made.instance(), "disk.swap", image_type)

    made.generate(image, 256 * units.Mi, _swap, swap_mb=256)

    assert _is_preallocated(image, 256 * units.Mi)


@pytest.mark.parametrize("image_type", ["qcow2", "raw"])
@pytest.mark.parametrize("name", ["disk.local", "disk.eph0"])
def test_ephemeral_disk_is_preallocated_after_mkfs_has_discarded(
    disks: Callable[..., nova_disks.Disks], image_type: str, name: str
) -> None:
    made = disks(default_ephemeral_format="ext4")
    image = made.image(made.instance(), name, image_type)

    made.generate(image, units.Gi, _ephemeral, ephemeral_size=1)

    assert _is_preallocated(image, units.Gi)


def test_root_disk_without_a_size_gets_its_base_images_size(disks: Callable[..., nova_disks.Disks], base: str) -> None:
    # A flavor with root_gb=0.
    image = disks().spawn(base, None)

    assert _is_preallocated(image, os.path.getsize(base))


@pytest.mark.parametrize("name", ["disk.rescue", "disk.local.rescue", "disk.eph0.rescue", "disk.swap.rescue"])
def test_rescue_disk_stays_thin(disks: Callable[..., nova_disks.Disks], base: str, name: str) -> None:
    image = disks().spawn(base, _4G, name=name)

    assert _inspect(image).state == "thin"


@pytest.mark.parametrize("name", ["kernel", "ramdisk"])
def test_kernel_and_ramdisk_are_left_alone(
    disks: Callable[..., nova_disks.Disks], base: str, name: str, commands: list[tuple[str, ...]]
) -> None:
    disks().spawn(base, None, name=name, image_type="raw")

    assert not [command for command in commands if "fallocate" in command]


def test_base_image_is_not_preallocated(disks: Callable[..., nova_disks.Disks], room: str) -> None:
    made = disks()
    thin = os.path.join(room, "thin-base")
    with open(thin, "wb") as file:
        file.truncate(units.Gi)

    made.spawn(thin, _4G)

    cached = os.path.join(made.instances_path, "_base", "thin-base")
    assert os.stat(cached).st_blocks == 0


def _asked_about(base: str, commands: list[tuple[str, ...]]) -> int:
    return sum(
        "info" in command and os.path.join("_base", os.path.basename(base)) in " ".join(command) for command in commands
    )


def test_base_image_is_not_asked_for_its_size_at_each_build(
    disks: Callable[..., nova_disks.Disks], base: str, commands: list[tuple[str, ...]]
) -> None:
    made = disks()
    made.spawn(base, _4G)
    first = _asked_about(base, commands)
    commands.clear()

    made.spawn(base, _4G)

    # create_image()'s own look at the base, before it puts a disk over it, stays.
    assert 0 < _asked_about(base, commands) < first


@pytest.mark.parametrize("image_type", ["qcow2", "raw"])
def test_flavor_smaller_than_its_image_is_refused_also_the_second_time(
    disks: Callable[..., nova_disks.Disks], base: str, image_type: str
) -> None:
    made = disks()
    made.spawn(base, _4G, image_type=image_type)

    with pytest.raises(exception.FlavorDiskSmallerThanImage):
        made.spawn(base, 128 * units.Mi, image_type=image_type)


def test_base_image_that_has_been_fetched_anew_is_asked_for_its_size_again(
    disks: Callable[..., nova_disks.Disks], base: str, small_base: str
) -> None:
    made = disks()
    made.spawn(small_base, _4G)
    cached = os.path.join(made.instances_path, "_base", os.path.basename(small_base))
    os.unlink(cached)
    os.link(base, cached)

    with pytest.raises(exception.FlavorDiskSmallerThanImage):
        made.spawn(small_base, 128 * units.Mi)


def test_nothing_but_the_disk_is_left_in_the_instances_folder(
    disks: Callable[..., nova_disks.Disks], base: str
) -> None:
    image = disks().spawn(base, _4G)

    assert set(os.listdir(os.path.dirname(image.path))) == {"disk", "disk.info"}


def test_disk_with_data_is_reserved_and_not_replaced(disks: Callable[..., nova_disks.Disks], base: str) -> None:
    image = disks(preallocated=False).spawn(base, _4G)
    images.qemu_io(image.path, "write -P 7 1G 1M")
    before = os.stat(image.path)
    made = disks()

    made.cache(made.image_at(image.path), base, _4G)

    after = os.stat(image.path)
    assert _inspect(image).state == "reserved"
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)


def test_disk_with_data_is_rewritten_if_the_operator_asks_for_it(
    disks: Callable[..., nova_disks.Disks], base: str, tmp_path: pathlib.Path
) -> None:
    image = disks(preallocated=False).spawn(base, _4G)
    images.qemu_io(image.path, "write -P 7 1G 1M")
    copy = str(tmp_path / "copy")
    subprocess.run(["cp", image.path, copy], check=True)
    made = disks(imgprealloc__existing_disks="rewrite")

    made.cache(made.image_at(image.path), base, _4G)

    assert _is_preallocated(image, _4G)
    assert images.reads_like(image.path, "qcow2", copy, "qcow2")


def test_holes_of_a_copied_disk_are_filled_at_the_next_start(disks: Callable[..., nova_disks.Disks], base: str) -> None:
    made = disks()
    image = made.spawn(base, _4G)
    copy = made.image(made.instance())
    subprocess.run(["cp", "--sparse=always", image.path, copy.path], check=True)
    inode = os.stat(copy.path).st_ino

    made.cache(copy, base, _4G)

    assert _is_preallocated(copy, _4G)
    assert os.stat(copy.path).st_ino == inode


@pytest.mark.parametrize("arriving_as", [None, "qcow2"])
@pytest.mark.parametrize("size", [units.Gi, 2 * units.Gi], ids=["same_size", "grown"])
@pytest.mark.parametrize("existing_disks", ["reserve", "rewrite"])
def test_disk_on_record_as_raw_is_not_taken_for_qcow2_by_its_own_first_bytes(
    disks: Callable[..., nova_disks.Disks],
    small_base: str,
    existing_disks: str,
    size: int,
    arriving_as: str | None,
) -> None:
    # Where Nova itself is patched (contrib/), there is no driver of ours to ask;
    # where a host has been switched to qcow2, its guests' XML says qcow2.
    made = disks(imgprealloc__existing_disks=existing_disks)
    image = made.spawn(small_base, units.Gi, image_type="raw")
    compute_host.write_qcow2_to(image.path, with_data=False)
    inode, length = os.stat(image.path).st_ino, os.stat(image.path).st_size
    told = {} if arriving_as is None else {image.path: arriving_as}

    with record.also_told(told), contextlib.suppress(processutils.ProcessExecutionError):
        made.cache(made.image_at(image.path, "qcow2"), small_base, size)

    found = os.stat(image.path)
    assert (found.st_ino, found.st_size) == (inode, length)
    with open(image.path, "rb") as disk, open(small_base, "rb") as base:
        disk.seek(32 * units.Mi)
        base.seek(32 * units.Mi)
        assert disk.read(units.Mi) == base.read(units.Mi)


def test_vmdk_that_nova_copies_is_left_as_it_is(
    disks: Callable[..., nova_disks.Disks], tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    vmdk = str(tmp_path / "base.vmdk")
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", vmdk, "64M"], check=True)
    options = {"force_raw_images": False, "use_cow_images": False}

    image = disks(**options).spawn(vmdk, 64 * units.Mi, image_type="raw")
    stock = disks(preallocated=False, preallocate_images="none", **options).spawn(vmdk, 64 * units.Mi, image_type="raw")

    assert image.driver_format == "vmdk"
    assert f"{image.path}: not preallocated" in caplog.text
    with open(image.path, "rb") as ours, open(stock.path, "rb") as theirs:
        assert ours.read() == theirs.read()


def test_trim_of_a_disk_of_another_format_is_let_through(
    disks: Callable[..., nova_disks.Disks], tmp_path: pathlib.Path
) -> None:
    vmdk = str(tmp_path / "base.vmdk")
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", vmdk, "64M"], check=True)

    image = disks(force_raw_images=False, use_cow_images=False, libvirt__hw_disk_discard="unmap").spawn(
        vmdk, 64 * units.Mi, image_type="raw"
    )

    assert image.libvirt_info("none", {}).driver_discard == "unmap"


# In its header: incompatible features, and the first one of them.
_INCOMPATIBLE, _DIRTY = 72, 1


def _dirty_image(path: pathlib.Path, content: str) -> str:
    """Make an image of which a writer was killed that wrote no refcounts yet (lazy): it is marked as dirty."""
    images.qcow2_of(path, content, "-o", "compat=1.1,lazy_refcounts=on")
    command = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 100M 1M", "-c", "flush", "-c", "sigraise 9", str(path)]
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0
    with path.open("rb") as file:
        file.seek(_INCOMPATIBLE)
        assert int.from_bytes(file.read(8), "big") & _DIRTY
    assert subprocess.run(["qemu-img", "check", "-f", "qcow2", path], check=False, capture_output=True).returncode
    return str(path)


@pytest.mark.parametrize("size", [units.Gi, 0], ids=["grown", "root_gb=0"])
def test_build_from_a_dirty_image_goes_on_as_with_stock_nova(
    disks: Callable[..., nova_disks.Disks],
    small_base: str,
    tmp_path: pathlib.Path,
    size: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sparse = images.sparse_file(tmp_path / "content", 256 * units.Mi)
    dirty = _dirty_image(tmp_path / "base.qcow2", str(sparse))
    options = {"force_raw_images": False, "use_cow_images": False}
    stock = disks(preallocated=False, **options).spawn(dirty, size or None, image_type="raw")

    image = disks(**options).spawn(dirty, size or None, image_type="raw")

    assert image.driver_format == stock.driver_format == "qcow2"
    assert images.reads_like(image.path, "qcow2", stock.path, "qcow2")
    assert "wait for their repair" in caplog.text or _is_preallocated(image, size)


def test_broken_disk_does_not_keep_its_instance_from_starting(
    disks: Callable[..., nova_disks.Disks], base: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = disks()
    image = made.spawn(base, _4G)
    _spoil(image.path)

    made.cache(image, base, _4G)

    assert "not preallocated" in caplog.text


def test_no_space_is_the_error_that_nova_reschedules_on_and_leaves_no_disk(
    disks: Callable[..., nova_disks.Disks], base: str
) -> None:
    made = disks()
    image = made.image(made.instance())

    with pytest.raises(processutils.ProcessExecutionError):
        made.cache(image, base, 500 * units.Gi)

    assert os.listdir(os.path.dirname(image.path)) == ["disk.info"]


def test_no_space_leaves_a_disk_that_was_there_as_it_was(disks: Callable[..., nova_disks.Disks], base: str) -> None:
    made = disks()
    image = made.spawn(base, _4G)
    before = images.identity(image.path)

    with pytest.raises(processutils.ProcessExecutionError):
        made.cache(image, base, 500 * units.Gi)

    assert images.identity(image.path) == before


@pytest.fixture
def tight(request: pytest.FixtureRequest) -> Iterator[str]:
    """A small filesystem, to be filled; ext4 unless a test parametrizes it."""
    with loop_filesystem.mounted(getattr(request, "param", "ext4"), 768 * units.Mi) as mount_point:
        yield mount_point


def _stock_disk_on_a_full_filesystem(tight: str, small_base: str, **options: Any) -> Any:
    instances_path = os.path.join(tight, "instances")
    os.mkdir(instances_path)
    image = nova_disks.Disks(instances_path, preallocated=False, **options).spawn(small_base, 256 * units.Mi)
    images.qemu_io(image.path, "write -P 7 128M 20M")
    loop_filesystem.fill(tight)
    return image


def test_disk_that_stock_nova_would_start_is_started_though_what_it_lacks_cannot_be_had(
    tight: str, small_base: str, caplog: pytest.LogCaptureFixture
) -> None:
    image = _stock_disk_on_a_full_filesystem(tight, small_base)
    made = nova_disks.Disks(os.path.dirname(os.path.dirname(image.path)), preallocated=True)

    made.cache(made.image_at(image.path), small_base, 256 * units.Mi)

    assert _inspect(image).state == "thin"
    assert f"{image.path}: not preallocated" in caplog.text


def test_disk_that_stock_nova_would_not_start_for_want_of_space_is_not_started(tight: str, small_base: str) -> None:
    image = _stock_disk_on_a_full_filesystem(tight, small_base, preallocate_images="none")
    made = nova_disks.Disks(os.path.dirname(os.path.dirname(image.path)), preallocated=True)

    with pytest.raises(processutils.ProcessExecutionError):
        made.cache(made.image_at(image.path), small_base, 256 * units.Mi)


@pytest.mark.parametrize("tight", ["tmpfs"], indirect=True)
def test_disk_that_stock_nova_has_set_aside_is_started_where_the_filesystem_cannot_tell(
    tight: str, small_base: str, caplog: pytest.LogCaptureFixture
) -> None:
    # tmpfs has no extent map, and no more has NFS.
    image = _stock_disk_on_a_full_filesystem(tight, small_base)
    made = nova_disks.Disks(os.path.dirname(os.path.dirname(image.path)), preallocated=True)

    made.cache(made.image_at(image.path), small_base, 256 * units.Mi)

    assert "not preallocated" in caplog.text


def test_disk_that_may_not_be_read_is_left_to_nova(
    disks: Callable[..., nova_disks.Disks],
    small_base: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = disks()
    image = made.spawn(small_base, units.Gi)

    def forbidden(path: str, *_: Any) -> None:
        # Root may read everything here.
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    for name in ("virtual_size", "read"):
        monkeypatch.setattr(qcow2_header, name, forbidden)
    monkeypatch.setattr(cluster_map, "mapped", forbidden)
    made.cache(image, small_base, units.Gi)

    assert f"{image.path}: not preallocated" in caplog.text


def test_disk_that_stock_nova_calls_no_fallocate_for_is_started_on_a_full_filesystem(
    tight: str, small_base: str, caplog: pytest.LogCaptureFixture
) -> None:
    # As Nova does where a flavor has root_gb=0.
    image = _stock_disk_on_a_full_filesystem(tight, small_base, preallocate_images="none")
    made = nova_disks.Disks(os.path.dirname(os.path.dirname(image.path)), preallocated=True)

    made.cache(made.image_at(image.path), small_base, None)

    assert "not preallocated" in caplog.text


@pytest.mark.parametrize("tight", ["ext2"], indirect=True)
def test_disk_is_started_on_a_full_filesystem_that_has_no_fallocate(
    tight: str, small_base: str, caplog: pytest.LogCaptureFixture
) -> None:
    instances_path = os.path.join(tight, "instances")
    os.mkdir(instances_path)
    # Nova finds out about fallocate but once, and that was on another filesystem.
    stock = nova_disks.Disks(instances_path, preallocated=False, preallocate_images="none")
    image = stock.spawn(small_base, 256 * units.Mi, image_type="raw")
    loop_filesystem.fill(tight)
    made = nova_disks.Disks(instances_path, preallocated=True, imgprealloc__on_unsupported="full")

    made.cache(made.image_at(image.path, "raw"), small_base, 256 * units.Mi)

    assert "not preallocated" in caplog.text


def test_disk_is_started_where_what_it_lacks_cannot_be_had_nor_told(
    tight: str, small_base: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image = _stock_disk_on_a_full_filesystem(tight, small_base, preallocate_images="none")
    made = nova_disks.Disks(os.path.dirname(os.path.dirname(image.path)), preallocated=True)

    def unreadable(*_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fallocate, "held", unreadable)
    made.cache(made.image_at(image.path), small_base, 256 * units.Mi)

    assert "not preallocated" in caplog.text


def test_without_preallocation_no_command_is_added(
    disks: Callable[..., nova_disks.Disks], base: str, commands: list[tuple[str, ...]]
) -> None:
    def ran(preallocated: bool) -> list[tuple[str, ...]]:
        made = disks(preallocated=preallocated, preallocate_images="none")
        commands.clear()
        image = made.spawn(base, _4G)
        made.cache(image, base, 8 * units.Gi)
        image.libvirt_info("none", {})
        return [tuple(os.path.basename(word) for word in command) for command in commands]

    assert ran(True) == ran(False)


def test_flavor_chooses_its_own_mode(disks: Callable[..., nova_disks.Disks], base: str) -> None:
    image = disks().spawn(base, _4G, **{"imgprealloc:mode": "metadata"})

    assert _inspect(image).state == "mapped"


def test_cluster_size_of_overlays_is_an_option(disks: Callable[..., nova_disks.Disks], base: str) -> None:
    image = disks(imgprealloc__overlay_cluster_size=64 * units.Ki).spawn(base, _4G)

    assert _inspect(image).cluster_size == 64 * units.Ki


def test_held_disk_uses_native_io(disks: Callable[..., nova_disks.Disks], base: str) -> None:
    image = disks().spawn(base, _4G)

    assert image.libvirt_info("none", {}).driver_io == "native"


@pytest.mark.parametrize("cache_mode", ["writeback", "writethrough", "unsafe"])
def test_native_io_is_left_out_where_libvirt_would_refuse_it(
    disks: Callable[..., nova_disks.Disks], base: str, cache_mode: str
) -> None:
    image = disks().spawn(base, _4G)

    assert image.libvirt_info(cache_mode, {}).driver_io is None


def test_disk_without_space_does_not_use_native_io(disks: Callable[..., nova_disks.Disks], base: str) -> None:
    image = disks(imgprealloc__mode="metadata").spawn(base, _4G)

    assert image.libvirt_info("none", {}).driver_io is None


def test_trim_is_ignored_where_it_would_give_space_back(
    disks: Callable[..., nova_disks.Disks], base: str, caplog: pytest.LogCaptureFixture
) -> None:
    image = disks(libvirt__hw_disk_discard="unmap").spawn(base, _4G)

    assert [image.libvirt_info("none", {}).driver_discard for _ in range(2)] == ["ignore", "ignore"]
    assert caplog.text.count("protect_from_discard") == 1


def test_operator_can_let_guests_trim(disks: Callable[..., nova_disks.Disks], base: str) -> None:
    image = disks(libvirt__hw_disk_discard="unmap", imgprealloc__protect_from_discard=False).spawn(base, _4G)

    assert image.libvirt_info("none", {}).driver_discard == "unmap"


def test_other_backends_stay_novas_own(disks: Callable[..., nova_disks.Disks]) -> None:
    from nova.virt.libvirt import imagebackend

    backends = disks().backend.BACKEND

    assert (backends["lvm"], backends["rbd"], backends["ploop"]) == (
        imagebackend.Lvm,
        imagebackend.Rbd,
        imagebackend.Ploop,
    )
    assert all(issubclass(backends[name], imagebackend.Flat) for name in ("raw", "flat"))
    assert issubclass(backends["default"], imagebackend.Qcow2)


def test_warnings_are_not_repeated_at_each_start(
    disks: Callable[..., nova_disks.Disks], base: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = disks()
    image = made.spawn(base, _4G)
    _spoil(image.path)

    for _ in range(2):
        made.cache(image, base, _4G)

    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_disk_is_not_made_anew_where_its_base_is_gone_and_nova_s_own_look_at_it_fails(
    disks: Callable[..., nova_disks.Disks], small_base: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # As after a cold migration, to a host that has not had the image yet.
    made = disks(use_cow_images=kind == "qcow2")
    image = made.spawn(small_base, units.Gi, image_type=kind)
    os.unlink(os.path.join(made.instances_path, "_base", os.path.basename(small_base)))
    before = images.identity(image.path)
    exists = os.path.exists

    monkeypatch.setattr(os.path, "exists", lambda path: path != image.path and exists(path))
    # Nova gives up where it cannot see the disk's size either.
    with contextlib.suppress(exception.DiskNotFound):
        made.cache(made.image_at(image.path, kind), small_base, units.Gi)

    assert images.identity(image.path) == before
    assert os.path.exists(os.path.join(made.instances_path, "_base", os.path.basename(small_base)))
    assert sorted(os.listdir(os.path.dirname(image.path))) == ["disk", "disk.info"]


def test_disk_that_has_to_stay_gets_its_space_where_it_was_to_be_rewritten(
    disks: Callable[..., nova_disks.Disks], small_base: str, caplog: pytest.LogCaptureFixture
) -> None:
    stock = disks(preallocated=False, preallocate_images="none")
    image = stock.spawn(small_base, units.Gi)
    images.qemu_io(image.path, "write -P 5 1M 1M")
    made = nova_disks.Disks(stock.instances_path, preallocated=True, imgprealloc__existing_disks="rewrite")
    os.link(image.path, f"{image.path}.second")

    made.cache(made.image_at(image.path), small_base, units.Gi)

    assert imgprealloc.Preallocator().inspect(image.path, format="qcow2").state == "reserved"
    assert "not made anew" in caplog.text
