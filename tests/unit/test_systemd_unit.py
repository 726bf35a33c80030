# SPDX-License-Identifier: Apache-2.0
"""Unit files and drop-ins, as systemd reads them."""

from __future__ import annotations

import pathlib

import pytest

from imgprealloc import systemd_unit

NAME = "openstack-nova-compute.service"

RDO = """\
[Unit]
Description=OpenStack Nova Compute Server
ExecStart=/not/in/this/section

[Service]
User=nova
Type=notify
# ExecStart=/commented/out
ExecStart=/usr/bin/nova-compute

[Install]
ExecStart=/nor/in/this/one
WantedBy=multi-user.target
"""


def unit(root: pathlib.Path, text: str, folder: str = "usr/lib", name: str = NAME) -> pathlib.Path:
    path = root / folder / "systemd" / "system" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def command(root: pathlib.Path) -> tuple[str, ...]:
    found = systemd_unit.find(NAME, str(root))
    assert found is not None
    return found.command


def test_service_is_what_its_section_says(tmp_path: pathlib.Path) -> None:
    path = unit(tmp_path, RDO)

    found = systemd_unit.find(NAME, str(tmp_path))

    assert found == systemd_unit.Service(str(path), ("/usr/bin/nova-compute",), "nova", "", {})


def test_no_unit_is_none(tmp_path: pathlib.Path) -> None:
    assert systemd_unit.find(NAME, str(tmp_path)) is None


def test_masked_unit_is_none(tmp_path: pathlib.Path) -> None:
    unit(tmp_path, RDO)
    masked = tmp_path / "etc" / "systemd" / "system" / NAME
    masked.parent.mkdir(parents=True)
    masked.symlink_to("/dev/null")

    assert systemd_unit.find(NAME, str(tmp_path)) is None


def test_administrator_s_unit_counts_more_than_the_package_s(tmp_path: pathlib.Path) -> None:
    unit(tmp_path, RDO)
    unit(tmp_path, "[Service]\nExecStart=/opt/nova-compute\n", folder="etc")

    assert command(tmp_path) == ("/opt/nova-compute",)


@pytest.mark.parametrize("folder", ["etc", "run", "usr/lib"])
def test_drop_in_takes_the_command_back_and_gives_another(tmp_path: pathlib.Path, folder: str) -> None:
    unit(tmp_path, RDO)
    unit(
        tmp_path, "[Service]\nExecStart=\nExecStart=/usr/bin/nova-compute --config-file a\n", folder, f"{NAME}.d/a.conf"
    )

    assert command(tmp_path) == ("/usr/bin/nova-compute", "--config-file", "a")


def test_drop_ins_are_read_by_their_names_and_one_replaces_its_namesake(tmp_path: pathlib.Path) -> None:
    unit(tmp_path, RDO)
    unit(tmp_path, "[Service]\nExecStart=\nExecStart=/first\n", "usr/lib", f"{NAME}.d/10.conf")
    unit(tmp_path, "[Service]\nExecStart=\nExecStart=/last\n", "etc", f"{NAME}.d/20.conf")
    unit(tmp_path, "[Service]\nUser=other\n", "etc", f"{NAME}.d/30.conf")
    unit(tmp_path, "[Service]\nUser=hidden\n", "usr/lib", f"{NAME}.d/30.conf")
    unit(tmp_path, "[Service]\nUser=no-drop-in\n", "etc", f"{NAME}.d/40.conf.bak")

    found = systemd_unit.find(NAME, str(tmp_path))

    assert found is not None
    assert (found.command, found.user) == (("/last",), "other")


def test_command_has_its_quotes_marks_and_long_lines_as_systemd_reads_them(tmp_path: pathlib.Path) -> None:
    unit(tmp_path, '[Service]\nExecStart=-+/usr/bin/nova-compute \\\n  --config-file "/etc/nova/a b.conf"\n')

    assert command(tmp_path) == ("/usr/bin/nova-compute", "--config-file", "/etc/nova/a b.conf")


def test_variables_are_those_of_the_unit_and_its_files(tmp_path: pathlib.Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "sysconfig").write_text("# DIR=/no\nDIR=/etc/nova\nOPTIONS='--config-file a --config-dir b'\n")
    unit(
        tmp_path,
        "[Service]\nEnvironment=DIR=/before 'WORDS=one two'\nEnvironmentFile=-/etc/sysconfig\nEnvironmentFile=-/gone\n"
        "ExecStart=/usr/bin/nova-compute $OPTIONS --config-file=${DIR}/$$x.conf ${WORDS} $NOTHING\n",
    )

    assert command(tmp_path) == (
        "/usr/bin/nova-compute", "--config-file", "a", "--config-dir", "b",
        "--config-file=/etc/nova/$x.conf", "one two",
    )  # fmt: skip
