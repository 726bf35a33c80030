# SPDX-License-Identifier: Apache-2.0
"""The least that a cloud's services on one machine have to be told, as the text of their files.

Everything is at 127.0.0.1, in a network that nobody else is in; hence one password for all.
"""

from __future__ import annotations

from collections.abc import Mapping
import pathlib
import shutil

PASSWORD = "secret"
REGION = "RegionOne"

# Services with an API: their users in Keystone, kind, and where they answer.
IDENTITY = "http://127.0.0.1:5000/v3"
ENDPOINTS = {
    "glance": ("image", "http://127.0.0.1:9292"),
    "placement": ("placement", "http://127.0.0.1:8778"),
    "neutron": ("network", "http://127.0.0.1:9696"),
    "nova": ("compute", "http://127.0.0.1:8774/v2.1"),
}

DATABASES = ("keystone", "glance", "placement", "neutron", "nova", "nova_api", "nova_cell0")

_TRANSPORT = f"rabbit://openstack:{PASSWORD}@127.0.0.1:5672/"

Options = Mapping[str, Mapping[str, object]]


def database(name: str) -> str:
    """Return where a database is."""
    return f"mysql+pymysql://{name}:{PASSWORD}@127.0.0.1/{name}"


def _user(name: str) -> dict[str, object]:
    return {
        "auth_type": "password",
        "auth_url": IDENTITY,
        "username": name,
        "password": PASSWORD,
        "project_name": "service",
        "user_domain_name": "Default",
        "project_domain_name": "Default",
        "region_name": REGION,
    }


def _token(name: str) -> dict[str, object]:
    return {**_user(name), "www_authenticate_uri": IDENTITY, "service_token_roles_required": "true"}


def files() -> dict[str, Options]:
    """Return each file's options by their sections."""
    return {
        "/etc/keystone/keystone.conf": {
            "database": {"connection": database("keystone")},
            "token": {"provider": "fernet"},
        },
        "/etc/glance/glance-api.conf": {
            "DEFAULT": {"enabled_backends": "files:file"},
            "glance_store": {"default_backend": "files"},
            "files": {"filesystem_store_datadir": "/var/lib/glance/images"},
            "os_glance_staging_store": {"filesystem_store_datadir": "/var/lib/glance/staging"},
            "os_glance_tasks_store": {"filesystem_store_datadir": "/var/lib/glance/tasks"},
            "database": {"connection": database("glance")},
            "keystone_authtoken": _token("glance"),
            "paste_deploy": {"flavor": "keystone"},
        },
        "/etc/placement/placement.conf": {
            "placement_database": {"connection": database("placement")},
            "api": {"auth_strategy": "keystone"},
            "keystone_authtoken": _token("placement"),
        },
        # Servers here have no network. Nova asks Neutron for their ports all the same, as it stops them.
        "/etc/neutron/neutron.conf": {
            "DEFAULT": {
                "core_plugin": "ml2",
                "service_plugins": "router,port_forwarding",
                "transport_url": _TRANSPORT,
                "state_path": "/var/lib/neutron",
                "auth_strategy": "keystone",
            },
            "database": {"connection": database("neutron")},
            "keystone_authtoken": _token("neutron"),
            "oslo_concurrency": {"lock_path": "/var/lib/neutron/lock"},
        },
        "/etc/neutron/plugins/ml2/ml2_conf.ini": {
            "ml2": {"type_drivers": "local", "tenant_network_types": "local", "mechanism_drivers": ""},
        },
        "/etc/nova/nova.conf": {
            "DEFAULT": {
                "transport_url": _TRANSPORT,
                "my_ip": "127.0.0.1",
                "state_path": "/var/lib/nova",
                "preallocate_images": "space",
                "allow_resize_to_same_host": "true",
                # The guest does not listen to its power button.
                "shutdown_timeout": 0,
                # Whether the disks fit is what this is about.
                "disk_allocation_ratio": 16.0,
                "reserved_host_memory_mb": 0,
            },
            "api_database": {"connection": database("nova_api")},
            "database": {"connection": database("nova")},
            "keystone_authtoken": _token("nova"),
            "service_user": {**_user("nova"), "send_service_user_token": "true"},
            "placement": _user("placement"),
            "neutron": _user("neutron"),
            "glance": {"region_name": REGION},
            "oslo_concurrency": {"lock_path": "/var/lock/nova"},
            "vnc": {"enabled": "false"},
            "imgprealloc": {"heal_interval": 5},
        },
        # Where Debian has the driver, after nova.conf, so that it is this file that counts.
        "/etc/nova/nova-compute.conf": nova_compute("libvirt.LibvirtDriver"),
        # Nobody wants it after a crash, and many tables are made.
        "/etc/mysql/mariadb.conf.d/99-cloud.cnf": {
            "mariadbd": {"innodb_flush_log_at_trx_commit": 0, "innodb_flush_method": "nosync"}
        },
        # Nothing that a container does not let us have.
        "/etc/libvirt/qemu.conf": {"": {"security_driver": '"none"', "namespaces": "[]", "cgroup_controllers": "[]"}},
        "/etc/libvirt/libvirtd.conf": {
            "": {"auth_unix_ro": '"none"', "auth_unix_rw": '"none"', "unix_sock_group": '"libvirt"',
                 "unix_sock_rw_perms": '"0770"'},
        },
    }  # fmt: skip


def nova_compute(driver: str) -> Options:
    """Return the options of nova-compute.conf, with one of the two drivers."""
    return {
        "DEFAULT": {"compute_driver": driver},
        # KVM is ten times faster, but there are machines on which it is there and guests hang.
        "libvirt": {"virt_type": "qemu", "cpu_mode": "none"},
    }


def text(options: Options) -> str:
    """Return a file's text; options of no section come without one."""
    lines = []
    for section, values in options.items():
        lines += [f"[{section}]"] if section else []
        lines += [f"{name} = {value}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def write(path: str, options: Options) -> None:
    """Write a file; owner and mode are those of the one that its package brought."""
    file = pathlib.Path(path)
    if file.exists():
        file.write_text(text(options))
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text(options))
    service = file.parts[2]
    if service not in ("libvirt", "mysql"):
        shutil.chown(file, "root", service)
        file.chmod(0o640)
