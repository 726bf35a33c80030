# SPDX-License-Identifier: Apache-2.0
"""Nova's libvirt driver with preallocating disks; all that is done to Nova is here.

Nova's own code runs first everywhere, with all its checks, and is asked to
leave out its one fallocate. To be imported only once Nova has read its
configuration, because imagebackend reads options as it is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import json
import os
import threading
from typing import TYPE_CHECKING, Any

from nova.compute import utils as compute_utils
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import utils as libvirt_utils
from oslo_config import cfg
from oslo_log import log as logging
from oslo_utils import fileutils
from oslo_utils import strutils
from oslo_utils import units

from imgprealloc import disk_file
from imgprealloc import exceptions
from imgprealloc import healing
from imgprealloc import instances
from imgprealloc import log
from imgprealloc import looks
from imgprealloc import opts
from imgprealloc import presence
from imgprealloc import qcow2_header
from imgprealloc import record
from imgprealloc import refilling
from imgprealloc import rounds
from imgprealloc import seams
from imgprealloc import strategies
from imgprealloc import subclusters
from imgprealloc.format import Existing
from imgprealloc.image import DiskImage
from imgprealloc.image import FileStamp
from imgprealloc.preallocator import FORMATS
from imgprealloc.preallocator import Preallocator
from nova import context as nova_context
from nova import objects

try:
    from nova.privsep.imgprealloc import fill as fill_as_root
except ImportError:
    # Beside a Nova in another place than ours, as with the patch in contrib/.
    fill_as_root = None

CONF = cfg.CONF
LOG = logging.getLogger(__name__)

# virtio and SATA disks count in sectors of this many bytes.
_SECTOR = 512

# What libvirt accepts beside io=native.
_DIRECT_CACHE_MODES = ("none", "directsync")


# What is known of base images, by their names: the file (device, inode, length)
# and its virtual size. A process that tells it takes 40 ms of a build's 300.
_base_sizes: dict[str, tuple[tuple[int, int, int], int]] = {}

# The disks that have been looked after for a start that is under way, as they
# were then. A start that fails leaves its own behind.
_MOST_LOOKED_AFTER = 10_000
_looked_after: dict[str, FileStamp] = {}

# GiB that Nova takes each disk to have at the least that a live migration sends.
_LEAST_TO_SEND = 2

# Of a thread that heals disks while nova-compute goes on.
BACKGROUND = "imgprealloc"


def is_on(conf: cfg.ConfigOpts = CONF) -> bool:
    """Whether nova.conf asks for preallocation, as Nova's backends read it."""
    return bool(strutils.to_slug(conf.preallocate_images) == "space")


def is_patched(use_cow_images: bool) -> bool:
    """Whether Nova's own Backend makes preallocating disks already (contrib/)."""
    return any(issubclass(backend, _Preallocating) for backend in imagebackend.Backend(use_cow_images).BACKEND.values())


def preallocating(backends: dict[str, type]) -> dict[str, type]:
    """Return Nova's dict of image backends with those that are files replaced.

    :param backends: as nova.virt.libvirt.imagebackend.Backend makes it
    :raises: IncompatibleNova, oslo.config's errors for an option that is invalid
    """
    faults = [f"{seam.name}: {seam.fault}" for seam in seams.compared() if seam.fault]
    if faults:
        raise exceptions.IncompatibleNova(faults)
    opts.register(CONF)
    if is_on():
        opts.validate(CONF)
    ours = {imagebackend.Flat: Flat, imagebackend.Qcow2: Qcow2}
    return {name: ours.get(backend, backend) for name, backend in backends.items()}


class LibvirtDriver(driver.LibvirtDriver):  # type: ignore[misc]
    """Nova's libvirt driver, for compute_driver = imgprealloc.LibvirtDriver."""

    def __init__(self, virtapi: Any, read_only: bool = False) -> None:
        super().__init__(virtapi, read_only)
        self.image_backend.BACKEND = preallocating(self.image_backend.BACKEND)
        self._rounds: rounds.Rounds[tuple[Any, Any]] | None = None

    def init_host(self, host: str) -> None:
        """Begin to look after the disks of the guests that run, as a service starts."""
        super().init_host(host)
        try:
            self._begin_rounds(host)
        except Exception:
            LOG.exception("What running guests give back is not set aside again until this service is started anew")

    def _begin_rounds(self, host: str) -> None:
        if is_on() and opts.refills(CONF) and self._rounds is None:
            self._rounds = rounds.Rounds(
                BACKGROUND,
                CONF.imgprealloc.heal_interval,
                lambda: self._running_guests(host),
                lambda found: _refill(*found),
            )
        if self._rounds is not None:
            self._rounds.start()

    def cleanup_host(self, host: str) -> None:
        """Begin no more, as it stops."""
        if self._rounds is not None:
            self._rounds.stop()
        super().cleanup_host(host)

    def _running_guests(self, host: str) -> dict[str, tuple[Any, Any]]:
        """List the guests that run, with their instances, but for those that Nova is doing something to."""
        here = objects.InstanceList.get_by_host(nova_context.get_admin_context(), host, expected_attrs=["flavor"])
        idle = {instance.uuid: instance for instance in here if instance.task_state is None}
        guests = self._host.list_guests(only_running=True)
        return {guest.uuid: (guest, idle[guest.uuid]) for guest in guests if guest.uuid in idle}

    def finish_migration(
        self, context: Any, migration: Any, instance: Any, disk_info: str, *args: Any, **kwargs: Any
    ) -> None:
        """Remember what the disks are, and whose, while Nova looks after them and converts the raw ones."""
        formats = {info["path"]: info["type"] for info in json.loads(disk_info)} if is_on() else {}
        with strategies.arriving(instance), record.also_told(formats):
            super().finish_migration(context, migration, instance, disk_info, *args, **kwargs)

    def _disk_raw_to_qcow2(self, path: str) -> None:
        """Set space aside for a disk that a resize has converted, after cache() has had its turn."""
        super()._disk_raw_to_qcow2(path)
        if is_on():
            # Nova's own record stays at raw; it has just been converted by itself.
            _heal(path, "qcow2", strategies.arriving_with(path), existing=strategies.existing_disks())

    def _create_images_and_backing(
        self, context: Any, instance: Any, instance_dir: str, disk_info: Any, fallback_from_host: str | None = None
    ) -> None:
        """Preallocate also those disks that Nova makes, or starts, past its backends: those without a backing file."""
        alone = {}
        for info in disk_info or () if is_on() else ():
            path = os.path.join(instance_dir, os.path.basename(info["path"]))
            if not info["backing_file"] and instances.is_disk(path):
                alone[path] = (info["type"], presence.was_absent(path))
        super()._create_images_and_backing(context, instance, instance_dir, disk_info, fallback_from_host)
        for path, (format, is_new) in alone.items():
            if not is_new:
                # Stock Nova calls no fallocate for one that is there.
                _heal(path, format, instance)
                _note_looked_after(path)
                continue
            record.believe(path)
            try:
                healing.preallocate_new(strategies.now(instance), path, format, compute_utils.disk_ops_semaphore)
                _note_looked_after(path)
            except exceptions.NoSpace:
                raise
            except exceptions.PreallocationError as exc:
                log.warn_once("not preallocated", path, f"not preallocated: {exc}")
            except Exception:
                LOG.exception("%s: not preallocated", path)

    def pre_live_migration(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> Any:
        """Write no zeros to what Nova makes here; the disks arrive afterwards."""
        with strategies.expecting(instance):
            return super().pre_live_migration(context, instance, *args, **kwargs)

    def _live_migration_data_gb(self, instance: Any, disk_paths: Iterable[str]) -> float:
        """Tell how much there is to send, in GiB: what is in a disk, and not how long its file is.

        By that Nova is patient with a migration, and slow to let the guest stand still
        for longer at its end.
        """
        to_send = {path: _bytes_to_send(path) for path in disk_paths}
        others = [path for path, size in to_send.items() if size is None]
        rest = float(super()._live_migration_data_gb(instance, others))
        return rest + sum(max(_LEAST_TO_SEND, size / units.Gi) for size in to_send.values() if size is not None)

    def post_live_migration_at_destination(
        self,
        context: Any,
        instance: Any,
        network_info: Any,
        block_migration: bool = False,
        block_device_info: Any = None,
    ) -> None:
        """Have the holes filled that QEMU's mirror has made in a disk; its guest runs here already.

        The source waits for the answer to this call, while the database says
        that the instance is still there.
        """
        super().post_live_migration_at_destination(context, instance, network_info, block_migration, block_device_info)
        if is_on() and block_migration:
            with _warning_of_faults(instance):
                strategy = healing.without_zeros(strategies.now(instance))
                # Not in a pool of Nova's, for which nova-compute waits when it stops.
                threading.Thread(
                    target=self._heal_arrived, args=(strategy, instance, block_device_info), name=BACKGROUND,
                    daemon=True,
                ).start()  # fmt: skip

    def _heal_arrived(self, strategy: Preallocator, instance: Any, block_device_info: Any) -> None:
        with _warning_of_faults(instance):
            for info in self._get_instance_disk_info(instance, block_device_info):
                if instances.is_disk(info["path"]):
                    healing.heal(
                        strategy, info["path"], info["type"], "reserve", compute_utils.disk_ops_semaphore,
                        filler=fill_as_root,
                    )  # fmt: skip

    def _soft_reboot(self, instance: Any) -> bool:
        """Look after the disks while the guest still runs; once it has ended, Nova has libvirt start it at once."""
        if is_on():
            with _warning_of_faults(instance):
                _heal_described(self._host.get_guest(instance).get_xml_desc(), instance, is_started=True)
        return bool(super()._soft_reboot(instance))

    def _create_guest(
        self,
        context: Any,
        xml: str,
        instance: Any,
        power_on: bool = True,
        pause: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Look after the disks of a guest that Nova starts without having done so.

        At the host's boot, unrescue, rescue, resume, and the revert of a resize.
        """
        if is_on():
            with _warning_of_faults(instance):
                _heal_described(xml, instance, is_started=power_on or pause)
        return super()._create_guest(context, xml, instance, power_on, pause, *args, **kwargs)


def _bytes_to_send(path: str) -> int | None:
    """Return how much of a disk a block live migration sends; None where its file's length tells."""
    try:
        if is_on() and instances.is_disk(path) and record.agrees(path, "qcow2"):
            with disk_file.opened(path) as file:
                return subclusters.allocated(file.fd)
    except Exception as exc:
        LOG.debug("%s: counted by its length: %s", path, exc)
    return None


@contextlib.contextmanager
def _warning_of_faults(instance: Any) -> Iterator[None]:
    """Warn of what fails, whatever it is, in what Nova must not be kept from by us."""
    try:
        yield
    except Exception as exc:
        LOG.warning("Its disks are not looked after until the next start: %s", exc, instance=instance)


def _heal_described(xml: str, instance: Any, *, is_started: bool) -> None:
    """Set aside the space of the disks that libvirt is told of, unless cache() has had its turn at them."""
    for path, format in _described_disks(xml, instance):
        # Asked in any case, because the note is for this one start.
        if not _was_looked_after(path) and is_started and record.agrees(path, format):
            healing.heal(
                opts.for_existing(CONF, healing.without_zeros(strategies.now(instance))), path, format, "reserve",
                compute_utils.disk_ops_semaphore, copying=False, filler=fill_as_root,
            )  # fmt: skip


def _refill(guest: Any, instance: Any) -> None:
    """Set aside again what a guest that runs has given back."""
    try:
        strategy = opts.for_existing(CONF, strategies.asked_for(instance))
        for path, format in _described_disks(guest.get_xml_desc(), instance):
            try:
                refilling.refill(strategy, path, fill_as_root, format=format)
            except exceptions.DiskNotFound:
                LOG.debug("%s is gone", path, instance=instance)
            except exceptions.PreallocationError as exc:
                log.warn_once("given back", path, f"it stays short of what its guest has given back: {exc}")
    except Exception as exc:
        if _has_ended(exc):
            LOG.debug("%s", exc, instance=instance)
        else:
            log.warn_once("running", instance.uuid, f"the disks of this running instance are not looked at: {exc}")


def _has_ended(exc: Exception) -> bool:
    """Whether libvirt was asked for a guest that has ended meanwhile, or moved away."""
    libvirt = driver.libvirt
    return isinstance(exc, libvirt.libvirtError) and exc.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN


def _described_disks(xml: str, instance: Any) -> Iterator[tuple[str, str]]:
    """List the disks of ours that a guest's description has, each with its format."""
    config = vconfig.LibvirtConfigGuest()
    config.parse_str(xml)
    # A guest that has come from another host has that one's spelling.
    folder = os.path.realpath(libvirt_utils.get_instance_path(instance))
    for device in config.devices:
        if not isinstance(device, vconfig.LibvirtConfigGuestDisk) or device.source_type != "file":
            continue
        path, format = device.source_path, device.driver_format
        # Its name first: the folder of a volume may be where nobody answers.
        if path and format and instances.is_disk(path) and os.path.realpath(os.path.dirname(path)) == folder:
            yield path, format


def _note_looked_after(path: str) -> None:
    if len(_looked_after) > _MOST_LOOKED_AFTER:
        _looked_after.clear()
    with contextlib.suppress(OSError):
        _looked_after[path] = FileStamp.from_stat(os.stat(path))


def _was_looked_after(path: str) -> bool:
    """Whether a disk has been looked after, and nobody has touched it since."""
    noted = _looked_after.pop(path, None)
    try:
        return noted is not None and noted == FileStamp.from_stat(os.stat(path))
    except OSError:
        return False


def _heal(
    path: str,
    format: str,
    instance: Any,
    *,
    existing: Existing | None = None,
    stock_length: int | None = None,
    known: DiskImage | None = None,
) -> None:
    """Preallocate a disk that was there, as nova.conf and Nova's records of its format allow.

    :param existing: what may happen to it, where that is known
    :param stock_length: bytes that stock Nova would have called fallocate for
    :param known: the disk as it has just been found
    :raises: NoSpace where that would have failed, too
    """
    greatest = None
    if existing is None:
        existing = strategies.existing_disks()
        if not record.agrees(path, format):
            # Nova takes all disks of its Qcow2 backend for qcow2, but a raw one
            # may have come from another host, or from before use_cow_images was
            # set. One that Nova has converted stays on record as raw.
            if existing != "reserve":
                log.warn_once(
                    "not on record", path, f"not rewritten: it may not be {format}, by Nova's records (disk.info)"
                )
            existing = "reserve"
            greatest = _greatest_size(instance, path) if stock_length is None else stock_length
    healing.heal(
        strategies.for_existing(instance),
        path,
        format,
        existing,
        compute_utils.disk_ops_semaphore,
        stock_length=stock_length,
        greatest=greatest,
        filler=fill_as_root,
        known=known,
    )


def _greatest_size(instance: Any, path: str) -> int:
    """Return the bytes that a disk can have been made with; where the flavor does not tell, those that its file has."""
    flavor = getattr(instance, "flavor", None)
    name = os.path.basename(path)
    if name == "disk":
        size = getattr(flavor, "root_gb", 0) * units.Gi
    elif name == "disk.swap":
        size = getattr(flavor, "swap", 0) * units.Mi
    else:
        size = getattr(flavor, "ephemeral_gb", 0) * units.Gi
    try:
        # As large as its image, with root_gb = 0.
        return size or os.stat(path).st_size
    except OSError:
        # Whoever looks at it next will tell.
        return 0


if TYPE_CHECKING:
    from nova.virt.libvirt.imagebackend import Image as _Image
else:
    # Which of Nova's classes stands behind it, the subclasses say.
    _Image = object


class _Preallocating(_Image):  # type: ignore[misc]
    """What Flat and Qcow2 have in common; stands before Nova's class among the bases."""

    path: str

    def __init__(
        self,
        instance: Any = None,
        disk_name: str | None = None,
        path: str | None = None,
        disk_info_mapping: Any = None,
    ) -> None:
        if is_on():
            # Before Nova notes, of a disk that it finds, what nova.conf says.
            record.doubt(path or os.path.join(libvirt_utils.get_instance_path(instance), str(disk_name)))
        super().__init__(instance, disk_name, path, disk_info_mapping)
        self._instance = instance
        # Whether cache() has found the disk there already, and what it has grown into since.
        self._existed = False
        self._grown: DiskImage | None = None

    @property
    def _is_as_uploaded(self) -> bool:
        """Whether the disk is a copy of an image that Nova was told to leave as it is."""
        return False

    @property
    def _is_ours(self) -> bool:
        return bool(self.preallocate) and instances.is_disk(self.path)

    def cache(self, fetch_func: Any, filename: str, size: int | None = None, *args: Any, **kwargs: Any) -> None:
        """Let Nova make the disk or find it there, then preallocate it."""
        if not self._is_ours:
            super().cache(fetch_func, filename, size, *args, **kwargs)
            return
        self._existed = not presence.was_absent(self.path)
        super().cache(fetch_func, filename, size, *args, **kwargs)
        # Not under the lock of the base image, on which all builds from that
        # image would wait.
        if self._existed:
            if not self._awaits_conversion():
                _heal(self.path, self.driver_format, self._instance, stock_length=size, known=self._grown)
        elif self.driver_format not in FORMATS:
            # A copy of an image that Nova was told to leave as it is.
            log.warn_once("format", self.path, f"not preallocated: its format is {self.driver_format}")
        else:
            made = os.stat(self.path)
            record.believe(self.path)
            with fileutils.remove_path_on_error(self.path, lambda path: presence.remove_same(path, made)):
                self._preallocate_new()
        _note_looked_after(self.path)

    def _preallocate_new(self) -> None:
        """Preallocate a disk that Nova has just made.

        :raises: PreallocationError, but not for what is wrong with an image
        """
        try:
            healing.preallocate_new(
                self._preallocator(), self.path, self.driver_format, compute_utils.disk_ops_semaphore
            )
        except (exceptions.NoSpace, exceptions.NotPreallocated, exceptions.UnsupportedFilesystem):
            raise
        except exceptions.PreallocationError as exc:
            if not self._is_as_uploaded:
                raise
            log.warn_once("not preallocated", self.path, f"not preallocated: {exc}")

    def exists(self) -> bool:
        """Whether the disk is there; one that cannot be looked at is not made anew."""
        return presence.is_there(self.path) if self._is_ours else bool(super().exists())

    def get_disk_size(self, name: str) -> int:
        """Return the virtual size of a base image, in bytes; Nova asks twice for each disk.

        Nova's checks of what is in the base are create_image()'s, at each build.
        Its mtime says nothing: Nova sets it at each build, for the cache manager.
        """
        if not self._is_ours or name == self.path:
            return int(super().get_disk_size(name))
        try:
            status = os.stat(name)
        except OSError:
            return int(super().get_disk_size(name))
        file = (status.st_dev, status.st_ino, status.st_size)
        known = _base_sizes.get(name)
        if known is None or known[0] != file:
            known = _base_sizes[name] = (file, int(super().get_disk_size(name)))
        return known[1]

    def resize_image(self, size: int) -> None:
        """Grow the disk, the new part preallocated; called at each start, mostly for nothing."""
        is_qcow2 = self._is_ours and self.driver_format == "qcow2"
        if is_qcow2 and self._has_size(size):
            return
        if is_qcow2 and self._existed and record.agrees(self.path, "qcow2") and not self._awaits_conversion():
            self._grow(size)
            if self._has_size(size):
                return
            self._grown = None
        super().resize_image(size)

    def _has_size(self, size: int) -> bool:
        """Whether a disk that is qcow2 for sure is large enough; Nova would ask qemu-img."""
        if not record.agrees(self.path, "qcow2"):
            return False
        try:
            return qcow2_header.virtual_size(self.path) >= size
        except (exceptions.FormatMismatch, OSError):
            return False

    def _awaits_conversion(self) -> bool:
        """Whether it is a raw disk, migrated to where qcow2 is used; Nova converts it after cache()."""
        if self.driver_format != "qcow2":
            return False
        if record.told_of(self.path) == "raw":
            return True
        try:
            qcow2_header.virtual_size(self.path)
        except exceptions.FormatMismatch:
            return True
        except OSError:
            # Whoever looks after the disk next will tell.
            pass
        return False

    def _grow(self, size: int) -> None:
        # To have the filesystem inside grown, too, the last sector is left to Nova.
        left = _SECTOR if CONF.resize_fs_using_block_device else 0
        try:
            self._grown = self._preallocator().resize(self.path, size - left, format=self.driver_format)
        except exceptions.PreallocationError as exc:
            if isinstance(exc, exceptions.NoSpace) and healing.would_lack_space_in_stock_nova(self.path, size):
                raise
            log.warn_once("growth", self.path, f"grown without preallocation: {exc}")
        except Exception:
            LOG.exception("%s: grown without preallocation", self.path)

    def _can_fallocate(self) -> bool:
        """Keep Nova's cache() from its own fallocate."""
        return False

    def _preallocator(self) -> Preallocator:
        return strategies.now(self._instance)

    def libvirt_info(self, cache_mode: str, *args: Any, **kwargs: Any) -> Any:
        """Describe the disk to libvirt, by what its space is really worth."""
        config = super().libvirt_info(cache_mode, *args, **kwargs)
        if not self._is_ours or not self.exists():
            return config
        if cache_mode not in _DIRECT_CACHE_MODES:
            config.driver_io = None
        is_protected = config.driver_discard == "unmap" and CONF.imgprealloc.protect_from_discard
        if config.driver_io is None and not is_protected:
            # Nothing that is told depends on what the disk is.
            return config
        found = self._look()
        is_held = found is not None and found.state in healing.HELD
        if not is_held:
            # A write that has to allocate would stop QEMU's whole event loop.
            config.driver_io = None
        if is_protected and (is_held or self._will_be_held(found)):
            config.driver_discard = "ignore"
            log.warn_once(
                "ignored",
                "[libvirt] hw_disk_discard = unmap",
                "preallocated disks ignore it, because a TRIM would give their space back; "
                "set [imgprealloc] protect_from_discard to change that",
            )
        return config

    def _look(self) -> DiskImage | None:
        """Look at the disk; None where it cannot be told what it is."""
        try:
            return looks.at(self._preallocator(), self.path, self.driver_format)
        except exceptions.PreallocationError as exc:
            LOG.debug("%s: taken for thin: %s", self.path, exc)
        except Exception:
            LOG.exception("%s: taken for thin", self.path)
        return None

    def _will_be_held(self, found: DiskImage | None) -> bool:
        """Whether the disk's space is about to be set aside; Nova describes a guest before it looks after its disks."""
        if found is None:
            return False
        try:
            plan = strategies.for_existing(self._instance).plan(
                self.path, strategies.existing_disks(), format=self.driver_format, known=found, write_held=False
            )
            return not plan.refused and plan.state in healing.HELD
        except exceptions.PreallocationError as exc:
            LOG.debug("%s: taken for thin: %s", self.path, exc)
        except Exception:
            LOG.exception("%s: taken for thin", self.path)
        return False


class Flat(_Preallocating, imagebackend.Flat):  # type: ignore[misc]
    """Nova's Flat backend: a whole copy of the image, raw or qcow2.

    Its growth needs nothing of ours where it is raw: Nova makes a hole, and
    the end of cache() fills it.
    """

    @property
    def _is_as_uploaded(self) -> bool:
        return bool(self.driver_format != "raw")

    def create_image(self, prepare_template: Any, base: str, size: int | None, *args: Any, **kwargs: Any) -> None:
        """Let Nova fetch and check a base image; where there is a disk already, none is made in its place.

        Nova's own looks once more whether there is one, and takes a look that
        fails for proof that there is none.
        """
        if not (self._is_ours and self._existed):
            super().create_image(prepare_template, base, size, *args, **kwargs)
            return
        if "image_id" not in kwargs:
            if size:
                self.resize_image(size)
        else:
            if not presence.is_there(base):
                kwargs = {key: value for key, value in kwargs.items() if key != "safe"}
                prepare_template(*args, target=base, **kwargs)
            with contextlib.suppress(PermissionError):
                # The manager of the image cache goes by that.
                os.utime(base)
            self.verify_base_size(base, size)
        self.correct_format()

    def correct_format(self) -> None:
        """Find out the format of a disk that is there, or may be."""
        if not self._is_ours:
            super().correct_format()
        elif presence.is_there(self.path):
            self.driver_format = self.resolve_driver_format()

    def _get_driver_format(self) -> str:
        """Return the format of a disk that has no note under this path; a note under another goes before a probe."""
        noted = record.note(self.path).format if self._is_ours else None
        return noted if noted is not None else str(super()._get_driver_format())


class Qcow2(_Preallocating, imagebackend.Qcow2):  # type: ignore[misc]
    """Nova's Qcow2 backend: an overlay over the cached image."""

    def create_image(self, prepare_template: Any, base: str, size: int | None, *args: Any, **kwargs: Any) -> None:
        """Let Nova fetch and check a base image; where there is a disk already, none is made in its place.

        Nova's own looks once more whether there is one, and takes a look that
        fails for proof that there is none. So it is shown the disk by what is open
        of it, which is there for sure.
        """
        if not (self._is_ours and self._existed):
            super().create_image(prepare_template, base, size, *args, **kwargs)
            return
        path: str = self.path
        fd = self._opened()
        self.path = disk_file.name_for_programs(fd)
        try:
            super().create_image(prepare_template, base, size, *args, **kwargs)
        finally:
            self.path = path
            os.close(fd)

    def _opened(self) -> int:
        """Open the disk, or an empty file where that fails."""
        try:
            return os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return os.memfd_create("imgprealloc", os.MFD_CLOEXEC)
