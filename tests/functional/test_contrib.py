# SPDX-License-Identifier: Apache-2.0
"""What operators get in contrib/, by the programs that it is for."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import images
import pytest
import tools_needed

MiB = 1 << 20
GiB = 1 << 30

CONTRIB = pathlib.Path(__file__).parent.parent.parent / "contrib"
INSTANCE = "0d7a2c1e-53b7-4e0c-9f52-3b1f0c6d9a11"


@pytest.fixture(scope="module", autouse=True)
def _programs() -> None:
    tools_needed.require(["ansible-playbook", "promtool", "systemd-analyze"])


@pytest.fixture
def programs(tmp_path: pathlib.Path) -> pathlib.Path:
    """Give a folder for PATH in which imgprealloc is this one."""
    folder = tmp_path / "programs"
    folder.mkdir()
    path = os.pathsep.join(sys.path)
    (folder / "imgprealloc").write_text(
        f'#!/bin/sh\nPYTHONPATH="{path}" exec {sys.executable} -W ignore -m imgprealloc.cli "$@"\n'
    )
    (folder / "imgprealloc").chmod(0o755)
    return folder


# systemd


@pytest.mark.parametrize("unit", sorted(path.name for path in (CONTRIB / "systemd").iterdir()))
def test_systemd_has_nothing_to_say_of_a_unit(tmp_path: pathlib.Path, unit: str) -> None:
    # With the service that a timer starts beside it.
    folder = shutil.copytree(CONTRIB / "systemd", tmp_path / "units")

    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", folder / unit], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("unit", ["imgprealloc-allocate", "imgprealloc-metrics"])
def test_command_of_a_unit_is_one_that_the_command_takes(
    programs: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path, unit: str
) -> None:
    (line,) = (
        line for line in (CONTRIB / "systemd" / f"{unit}.service").read_text().splitlines() if line.startswith("Exec")
    )
    argv = line.partition("=")[2].replace("/var/lib/prometheus/node-exporter", str(tmp_path)).split()
    disk = instance(folder)
    home = tmp_path / "home"
    (home / ".nova").mkdir(parents=True)
    (home / ".nova" / "nova.conf").write_text(f"[DEFAULT]\ninstances_path = {folder}\n")

    done = subprocess.run(
        argv, capture_output=True, text=True, check=False,
        env={**os.environ, "HOME": str(home), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    if unit == "imgprealloc-metrics":
        assert 'state="thin"} 1.0' in (tmp_path / "imgprealloc.prom").read_text()
    else:
        assert images.holes(disk) == 0


# Prometheus


def promtool(*argv: str | pathlib.Path) -> str:
    done = subprocess.run(["promtool", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_rules() -> None:
    assert "SUCCESS: 4 rules found" in promtool("check", "rules", CONTRIB / "prometheus" / "rules.yaml")


def series(name: str, value: str, **labels: str) -> dict[str, str]:
    all_labels = {"instance": "compute1", "job": "node", **labels}
    return {"series": f"{name}{{{','.join(f'{key}={json.dumps(each)}' for key, each in all_labels.items())}}}",
            "values": value}  # fmt: skip


SUMMARY = "Guests on compute1 can run out of space"
DESCRIPTION = (
    "The disks below /full may still ask for 20GiB, which is more than there is. Guests stop with I/O errors once it "
    'is gone. Migrate instances, or free space; "imgprealloc show" names the disks.'
)


def fires(name: str, at: str, **labels: str) -> dict[str, Any]:
    """Say that an alert fires at a time, for what has these labels besides; or without any that it does not."""
    all_labels = {"alertname": name, "alertstate": "firing", "instance": "compute1", "job": "node", **labels}
    described = ",".join(f"{key}={json.dumps(value)}" for key, value in all_labels.items())
    return {
        "expr": f'ALERTS{{alertname="{name}",alertstate="firing"}}',
        "eval_time": at,
        "exp_samples": [{"labels": f"ALERTS{{{described}}}", "value": 1}] if labels else [],
    }


def test_rules_fire_for_what_they_are_for_and_not_before(tmp_path: pathlib.Path) -> None:
    full, roomy = {"filesystem": "/full"}, {"filesystem": "/roomy"}
    tests = {
        "rule_files": [str(CONTRIB / "prometheus" / "rules.yaml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    series("imgprealloc_short_bytes", f"{20 * GiB}x180", **full),
                    series("imgprealloc_available_bytes", f"{10 * GiB}x180", **full),
                    series("imgprealloc_short_bytes", f"{20 * GiB}x180", **roomy),
                    series("imgprealloc_available_bytes", f"{30 * GiB}x180", **roomy),
                    series("imgprealloc_disks", "3x180", state="thin", **full),
                    series("imgprealloc_disks", "2x180", state="mapped", **full),
                    series("imgprealloc_disks", "9x180", state="preallocated", **full),
                    series("imgprealloc_disks", "0x180", state="thin", **roomy),
                    series("imgprealloc_disks", "4x180", state="reserved", **roomy),
                    series("imgprealloc_errors", "0x90 1x90"),
                    # It is looked at for an hour and no longer.
                    series("imgprealloc_look_timestamp_seconds", "0+60x60 3600x120"),
                ],
                "promql_expr_test": [
                    fires("InstanceDisksExceedFilesystem", "4m"),
                    fires("InstanceDisksExceedFilesystem", "6m", severity="critical", **full),
                    fires("InstanceDisksNotHeld", "59m"),
                    fires("InstanceDisksNotHeld", "61m", severity="warning", **full),
                    fires("InstanceDisksUnreadable", "90m"),
                    fires("InstanceDisksUnreadable", "110m", severity="warning"),
                    fires("InstanceDisksNotLookedAt", "119m"),
                    fires("InstanceDisksNotLookedAt", "130m", severity="warning"),
                ],
                "alert_rule_test": [
                    {
                        "alertname": "InstanceDisksExceedFilesystem",
                        "eval_time": "6m",
                        "exp_alerts": [
                            {
                                "exp_labels": {"instance": "compute1", "job": "node", "severity": "critical", **full},
                                "exp_annotations": {"summary": SUMMARY, "description": DESCRIPTION},
                            }
                        ],
                    }
                ],
            }
        ],
    }
    # JSON is YAML, too.
    (tmp_path / "tests.yaml").write_text(json.dumps(tests))

    promtool("test", "rules", tmp_path / "tests.yaml")


# Ansible


def instance(folder: pathlib.Path) -> pathlib.Path:
    """Make an instance with a disk that has nothing of its space."""
    (folder / INSTANCE).mkdir()
    disk = images.sparse_file(folder / INSTANCE / "disk", 8 * MiB)
    (folder / INSTANCE / "disk.info").write_text(json.dumps({str(disk): "raw"}))
    return disk


@dataclasses.dataclass(frozen=True)
class Played:
    """What a run of the playbook has said.

    :param tasks: of the first host, by their names
    :param changed: how many tasks have changed something, by the hosts that were worked on
    """

    status: int
    said: str
    tasks: dict[str, str]
    changed: dict[str, int]


def play(programs: pathlib.Path, scratch: pathlib.Path, *more: str, **variables: object) -> Played:
    """Run the playbook on this machine, by two names."""
    chosen = {
        "imgprealloc_become": False,
        "imgprealloc_command": str(programs / "imgprealloc"),
        "imgprealloc_keep_free": "1M",
        **variables,
    }
    done = subprocess.run(
        [
            "ansible-playbook", "-i", "first,second", "-c", "local", *more, "-e", json.dumps(chosen),
            CONTRIB / "ansible" / "imgprealloc.yaml",
        ],
        capture_output=True, text=True, check=False,
        env={
            **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_HOME": str(scratch / "ansible"),
            "ANSIBLE_LOCAL_TEMP": str(scratch / "ansible"),
            "ANSIBLE_REMOTE_TEMP": str(scratch / "ansible"),
            "LC_ALL": "C.UTF-8",
        },
    )  # fmt: skip
    said = done.stdout + done.stderr
    tasks, _, recap = done.stdout.partition("PLAY RECAP")
    told: dict[str, str] = {}
    for task in tasks.split("TASK [")[1:]:
        name, _, rest = task.partition("]")
        # The first host's.
        told.setdefault(name, rest)
    changed = {host: int(number) for host, number in re.findall(r"^(\w+) .*changed=(\d+)", recap, re.MULTILINE)}
    return Played(done.returncode, said, told, changed)


def test_playbook_sets_aside_what_disks_lack_and_says_that_it_has(
    programs: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    disk = instance(folder)

    first = play(programs, tmp_path, imgprealloc_paths=[str(folder)])
    second = play(programs, tmp_path, imgprealloc_paths=[str(folder)])

    assert first.status == 0, first.said
    # By its other name it has been mended already.
    assert first.changed == {"first": 1, "second": 0}
    assert images.holes(disk) == 0
    # Once more, nothing is left to do.
    assert (second.status, second.changed) == (0, {"first": 0, "second": 0}), second.said
    assert "skipping: [first]" in second.tasks["Set it aside"]


def test_playbook_s_check_looks_and_plans_and_changes_nothing(
    programs: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    disk = instance(folder)
    before = images.identity(disk)

    played = play(programs, tmp_path, "--check", imgprealloc_paths=[str(folder)])

    assert played.status == 0, played.said
    assert images.identity(disk) == before
    assert f"{disk}: thin, {8 * MiB} bytes short" in played.tasks["Tell which of them have not all of their space"]
    assert "disk" in played.tasks["Tell the plan"]
    assert played.changed == {"first": 0, "second": 0}


def test_playbook_stops_where_it_cannot_be_known_which_disks_there_are(
    programs: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    played = play(programs, tmp_path, imgprealloc_paths=[str(folder)])

    assert played.status != 0
    assert "fatal: [first]: FAILED" in played.tasks["Look at the disks"]
    assert list(played.changed) == ["first"]


def test_playbook_leaves_free_what_it_is_told_to_and_stops_where_it_cannot_mend(
    programs: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    disk = instance(folder)
    before = images.identity(disk)

    played = play(programs, tmp_path, imgprealloc_paths=[str(folder)], imgprealloc_keep_free="1T")

    assert played.status != 0
    assert "fatal: [first]: FAILED" in played.tasks["Set it aside"]
    # One host at a time.
    assert list(played.changed) == ["first"]
    assert images.identity(disk) == before
