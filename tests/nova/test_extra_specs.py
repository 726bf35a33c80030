# SPDX-License-Identifier: Apache-2.0
"""imgprealloc:mode and imgprealloc:overlay_subclusters, as Nova's API validates it."""

from nova.api.validation.extra_specs import validators
import pytest

from nova import exception


@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_mode_of_a_flavor_is_accepted(mode: str) -> None:
    validators.validate("imgprealloc:mode", mode)


@pytest.mark.parametrize("subclusters", ["unallocated", "allocated", "copied"])
def test_subclusters_of_a_flavor_are_accepted(subclusters: str) -> None:
    validators.validate("imgprealloc:overlay_subclusters", subclusters)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("imgprealloc:mode", "sparse"),
        ("imgprealloc:mood", "full"),
        ("imgprealloc:overlay_subclusters", "full"),
        ("imgprealloc:overlay_cluster_size", "65536"),
    ],
)
def test_mistyped_extra_spec_is_refused(name: str, value: str) -> None:
    with pytest.raises(exception.ValidationError):
        validators.validate(name, value)
