# SPDX-License-Identifier: Apache-2.0
"""Bring a cloud up: its databases, its users and endpoints, its services, and what its server is made of."""

from __future__ import annotations

import contextlib
import datetime
import functools
import pathlib
import re
import shutil
import socket

from e2e.guest_image import GuestImage

from debian_cloud import configuration
from debian_cloud.client import cloud
from debian_cloud.client import openstack
from debian_cloud.client import shown
from debian_cloud.services import listens
from debian_cloud.services import run
from debian_cloud.services import running
from debian_cloud.services import wait

IMAGE = "guest"
# In GiB, of the root disk.
FLAVORS = {"small": 1, "large": 2}

INSTANCES = pathlib.Path("/var/lib/nova/instances")

# Of Debian's units, in the order in which they are started, and how it is seen that they are up.
_PORTS = {
    "mariadb": 3306,
    "rabbitmq-server": 5672,
    "keystone": 5000,
    "glance-api": 9292,
    "placement-api": 8778,
    "neutron-api": 9696,
    "nova-api": 8774,
}
_SOCKETS = {
    "virtlogd": pathlib.Path("/run/libvirt/virtlogd-sock"),
    "libvirtd": pathlib.Path("/run/libvirt/libvirt-sock"),
}

_SOURCES = ("imgprealloc", "nova", "setup.py", "setup.cfg", "pyproject.toml", "requirements.txt", "README.rst")

_SYNCS = {
    "keystone": (
        ("keystone-manage", "db_sync"),
        ("keystone-manage", "fernet_setup", "--keystone-user", "keystone", "--keystone-group", "keystone"),
        ("keystone-manage", "credential_setup", "--keystone-user", "keystone", "--keystone-group", "keystone"),
        ("keystone-manage", "bootstrap", "--bootstrap-password", configuration.PASSWORD,
         "--bootstrap-public-url", configuration.IDENTITY, "--bootstrap-internal-url", configuration.IDENTITY,
         "--bootstrap-region-id", configuration.REGION),
    ),
    "glance": (("glance-manage", "db_sync"),),
    "placement": (("placement-manage", "db", "sync"),),
    "neutron": (
        ("neutron-db-manage", "--config-file", "/etc/neutron/neutron.conf",
         "--config-file", "/etc/neutron/plugins/ml2/ml2_conf.ini", "upgrade", "heads"),
    ),
    "nova": (
        ("nova-manage", "api_db", "sync"),
        ("nova-manage", "cell_v2", "map_cell0"),
        ("nova-manage", "cell_v2", "create_cell", "--name", "cell1"),
        ("nova-manage", "db", "sync"),
    ),
}  # fmt: skip


def install(checkout: pathlib.Path) -> None:
    """Install imgprealloc where Debian has Nova, from a folder that is not written to."""
    source = pathlib.Path("/var/tmp/imgprealloc")
    source.mkdir()
    for name in _SOURCES:
        run("cp", "-r", str(checkout / name), str(source))
    run("pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(source), str(source),
        environment={"PBR_VERSION": "0"})  # fmt: skip
    [wheel] = source.glob("*.whl")
    # Not by pip, which has another folder than Debian, where Nova would not find its driver.
    run("python3", "-m", "zipfile", "-e", str(wheel), "/usr/lib/python3/dist-packages")
    script = pathlib.Path("/usr/bin/imgprealloc")
    script.write_text("#!/usr/bin/python3\nimport sys\nfrom imgprealloc.cli import main\nsys.exit(main())\n")
    script.chmod(0o755)


def configure() -> None:
    """Write all files, and make what systemd's tmpfiles would have made."""
    pathlib.Path("/etc/hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n")
    for name, options in configuration.files().items():
        configuration.write(name, options)
    for path in pathlib.Path("/etc").glob("*/*-uwsgi.ini"):
        # Debian's 8 and 16 of each would take minutes to be there, on a small machine.
        path.write_text(re.sub(r"(?m)^processes = \d+$", "processes = 1", path.read_text()))
    for service in ("nova", "neutron", "glance", "keystone", "placement"):
        for place in ("/run/lock", "/run"):
            folder = pathlib.Path(place, service)
            folder.mkdir(exist_ok=True)
            _give(folder, service)
    _give(INSTANCES, "nova")


def infrastructure(stack: contextlib.ExitStack) -> None:
    """Start the database, the message queue and libvirt."""
    pathlib.Path("/run/mysqld").mkdir(exist_ok=True)
    _give(pathlib.Path("/run/mysqld"), "mysql")
    _start(stack, "mariadb")
    statements = []
    for name in configuration.DATABASES:
        user = "nova" if name.startswith("nova") else name
        statements.append(f"CREATE DATABASE {name};")
        statements += [
            f"GRANT ALL ON {name}.* TO '{someone}'@'%' IDENTIFIED BY '{configuration.PASSWORD}';"
            for someone in {user, name}
        ]
    run("mariadb", "-e", "".join(statements))
    _start(stack, "rabbitmq-server")
    run("rabbitmqctl", "add_user", "openstack", configuration.PASSWORD)
    run("rabbitmqctl", "set_permissions", "openstack", ".*", ".*", ".*")
    for name, path in _SOCKETS.items():
        stack.enter_context(running(name, path.exists))


def control_plane(stack: contextlib.ExitStack) -> None:
    """Start Keystone, Glance, Placement, Neutron and Nova but for nova-compute."""
    _sync("keystone")
    _start(stack, "keystone")
    identity = cloud().identity
    project = identity.create_project(name="service", domain_id="default")
    roles = [identity.find_role(name) for name in ("admin", "service")]
    for name, (kind, url) in configuration.ENDPOINTS.items():
        user = identity.create_user(name=name, password=configuration.PASSWORD, domain_id="default")
        for role in roles:
            identity.assign_project_role_to_user(project, user, role)
        service = identity.create_service(name=name, type=kind)
        for interface in ("public", "internal"):
            identity.create_endpoint(
                service_id=service.id, interface=interface, url=url, region_id=configuration.REGION
            )
        _sync(name)
    # Its catalogue is that of before.
    cloud.cache_clear()
    for name in ("glance-api", "placement-api", "neutron-api", "nova-api"):
        _start(stack, name)
    # Until something else was asked, "type object 'Port' has no attribute 'port_forwardings'" is the answer to a
    # list of ports, which is what Nova wants.
    list(cloud().network.networks())
    for name in ("nova-conductor", "nova-scheduler"):
        stack.enter_context(running(name, functools.partial(_is_up, name, _now())))


def compute(driver: str) -> contextlib.AbstractContextManager[None]:
    """Return nova-compute with one of the drivers, to be started."""
    configuration.write("/etc/nova/nova-compute.conf", configuration.nova_compute(driver))
    return running("nova-compute", functools.partial(_is_up, "nova-compute", _now()))


def offer(guest: GuestImage) -> None:
    """Offer what the server is made of: its image, with kernel and ramdisk, and two flavors; know its host."""
    wait("nova-compute's host is known", _knows_host)
    properties = {
        "kernel_id": _image("kernel", guest.kernel, "aki", "aki"),
        "ramdisk_id": _image("ramdisk", guest.ramdisk, "ari", "ari"),
        "os_command_line": "console=ttyS0 quiet no_timer_check e2e_rewrite=vda",
    }
    _image(IMAGE, guest.root, "raw", "bare", **properties)
    for name, root in FLAVORS.items():
        openstack("flavor", "create", "--ram", "256", "--vcpus", "1", "--disk", str(root), "--ephemeral", "1", name)


def _start(stack: contextlib.ExitStack, name: str) -> None:
    stack.enter_context(running(name, functools.partial(listens, _PORTS[name])))


def _sync(user: str) -> None:
    for command in _SYNCS[user]:
        run(*command, user=user)


def _knows_host() -> bool:
    # nova-compute is up before it has said what it is on, and until then there is no host to be found.
    run("nova-manage", "cell_v2", "discover_hosts", user="nova")
    return socket.gethostname() in run("nova-manage", "cell_v2", "list_hosts", user="nova")


def _image(name: str, path: pathlib.Path, disk: str, container: str, **properties: str) -> str:
    formats = ("--disk-format", disk, "--container-format", container)
    told = [word for item in properties.items() for word in ("--property", "=".join(item))]
    return str(shown("image", "create", "--file", str(path), *formats, *told, name)["id"])


def _is_up(binary: str, since: str) -> bool:
    """Whether a service of Nova's has reported since then that it is there."""
    found = cloud().compute.services(binary=binary)
    return any(service.state == "up" and str(service.updated_at) > since for service in found)


def _now() -> str:
    # As Nova tells a time.
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def _give(path: pathlib.Path, user: str) -> None:
    shutil.chown(path, user, user)
