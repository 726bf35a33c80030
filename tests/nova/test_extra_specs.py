# SPDX-License-Identifier: Apache-2.0
"""imgprealloc:mode, as Nova's API validates it."""

from nova.api.validation.extra_specs import validators
import pytest

from nova import exception


@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_mode_of_a_flavor_is_accepted(mode: str) -> None:
    validators.validate("imgprealloc:mode", mode)


@pytest.mark.parametrize(("name", "value"), [("imgprealloc:mode", "sparse"), ("imgprealloc:mood", "full")])
def test_mistyped_extra_spec_is_refused(name: str, value: str) -> None:
    with pytest.raises(exception.ValidationError):
        validators.validate(name, value)
