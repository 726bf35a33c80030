# SPDX-License-Identifier: Apache-2.0
"""Which strategy an instance's disks get. What Nova does with it is in tests/nova."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fixtures
from oslo_utils import units
import pytest

from imgprealloc import log
from imgprealloc import strategies

from .test_opts import configured
from .test_opts import section

UUID = "0d7a2c1e-53b7-4e0c-9f52-3b1f0c6d9a11"


@pytest.fixture(autouse=True)
def conf() -> Iterator[None]:
    """Let nova.conf have what no flavor here asks for."""
    log.forget()
    conf = configured(section(mode="full", overlay_subclusters="allocated", overlay_cluster_size=65536, keep_free="5%"))
    with fixtures.MockPatchObject(strategies, "CONF", conf):
        yield


def instance(**extra_specs: str) -> Any:
    specs = {f"imgprealloc:{name}": value for name, value in extra_specs.items()}
    return SimpleNamespace(uuid=UUID, flavor=SimpleNamespace(extra_specs=specs))


def test_flavor_comes_before_nova_conf_in_what_it_may_choose() -> None:
    found = strategies.asked_for(instance(mode="metadata", overlay_cluster_size="131072"))

    assert (found.mode, found.overlay_subclusters, found.overlay_cluster_size) == (
        "metadata",
        "allocated",
        64 * units.Ki,
    )


@pytest.mark.parametrize("nobody", [None, SimpleNamespace(), SimpleNamespace(flavor=None)], ids=str)
def test_without_a_flavor_nova_conf_counts(nobody: Any) -> None:
    assert strategies.now(nobody).mode == "full"


def test_flavor_s_choice_that_there_is_not_is_warned_of_and_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    assert strategies.asked_for(instance(mode="fast")).mode == "full"

    assert "a flavor has 'fast', which is no mode; [imgprealloc] mode is taken instead" in caplog.text


def test_what_the_mirror_overwrites_is_neither_written_nor_allocated(caplog: pytest.LogCaptureFixture) -> None:
    with strategies.expecting(instance()):
        found = strategies.now(instance())

    assert (found.mode, found.overlay_subclusters) == ("falloc", "unallocated")
    assert "get mode falloc instead of full" in caplog.text
    assert strategies.now(instance()).mode == "full"


def test_space_is_kept_free_of_disks_that_are_there_but_not_of_those_that_arrive() -> None:
    assert strategies.for_existing(instance()).keep_free == "5%"
    with strategies.arriving(instance()):
        assert strategies.for_existing(instance()).keep_free == 0
    assert strategies.for_existing(instance()).keep_free == "5%"


def test_instance_that_arrives_is_known_by_the_folder_of_its_disks_until_that_has_ended_or_failed() -> None:
    arrives, path = instance(), f"/var/lib/nova/instances/{UUID}/disk"

    found = []

    def arrive() -> None:
        with strategies.arriving(arrives):
            found.extend([strategies.arriving_with(path), strategies.arriving_with("/var/lib/nova/instances/b/disk")])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        arrive()

    assert found == [arrives, None]
    assert strategies.arriving_with(path) is None


@pytest.mark.parametrize("existing", ["reserve", "rewrite"])
def test_nova_conf_says_what_may_happen_to_disks_with_data(existing: str) -> None:
    with fixtures.MockPatchObject(strategies, "CONF", configured(section(existing_disks=existing))):
        assert strategies.existing_disks() == existing
