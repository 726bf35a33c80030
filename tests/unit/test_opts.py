# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from importlib import metadata
import io
import re
from typing import Any, get_args

import fixtures
from oslo_config import cfg
from oslo_config import generator
import pytest

from imgprealloc import opts
from imgprealloc import settings


def configured(text: str = "") -> cfg.ConfigOpts:
    """Read a nova.conf of this text."""
    conf = cfg.ConfigOpts()
    opts.register(conf)
    with fixtures.TempDir() as folder:
        path = f"{folder.path}/nova.conf"
        with open(path, "w") as file:
            file.write(text)
        conf(["--config-file", path], default_config_files=[], default_config_dirs=[])
    return conf


def section(**values: object) -> str:
    return "[imgprealloc]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("mode", "falloc"),
        ("on_unsupported", "metadata"),
        ("existing_disks", "reserve"),
        ("protect_from_discard", True),
        ("overlay_cluster_size", 131072),
        ("keep_free", "1%,10G"),
    ],
)
def test_empty_section_gives_the_documented_defaults(name: str, default: object) -> None:
    assert configured().imgprealloc[name] == default


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("mode", ["falloc", "full", "metadata"]),
        ("on_unsupported", ["metadata", "full", "error"]),
        ("existing_disks", ["reserve", "rewrite"]),
        ("overlay_cluster_size", [16384, 32768, 65536, 131072, 262144, 524288, 1048576, 2097152]),
    ],
)
def test_all_that_an_option_offers_is_accepted_and_nothing_else_is_offered(name: str, choices: list[object]) -> None:
    option = next(option for option in opts.OPTIONS if option.name == name)

    kind: Any = option.type
    assert list(kind.choices) == choices
    for choice in choices:
        assert configured(section(**{name: choice})).imgprealloc[name] == choice


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "off"),
        ("mode", "fallocate"),
        ("mode", ""),
        ("on_unsupported", "falloc"),
        ("existing_disks", "convert"),
        ("protect_from_discard", "perhaps"),
        ("overlay_cluster_size", "128k"),
        ("overlay_cluster_size", 8192),
        ("overlay_cluster_size", 100000),
        ("overlay_cluster_size", 4194304),
        ("keep_free", "much"),
        ("keep_free", "200%"),
        ("keep_free", ""),
    ],
)
def test_anything_else_is_refused_when_it_is_read(name: str, value: object) -> None:
    conf = configured(section(**{name: value}))

    with pytest.raises(ValueError, match=f"Value for option {name} .* is not valid"):
        getattr(conf.imgprealloc, name)


@pytest.mark.parametrize("mode", get_args(settings.Mode))
@pytest.mark.parametrize("on_unsupported", get_args(settings.OnUnsupported))
def test_every_choice_makes_a_preallocator_that_works_by_it(mode: str, on_unsupported: str) -> None:
    conf = configured(section(mode=mode, on_unsupported=on_unsupported, overlay_cluster_size=65536))

    made = opts.preallocator_from(conf)

    assert (made.mode, made.on_unsupported, made.overlay_cluster_size) == (mode, on_unsupported, 65536)


def test_flavor_s_mode_comes_before_the_configured_one() -> None:
    made = opts.preallocator_from(configured(section(mode="metadata", overlay_cluster_size=65536))).with_mode("full")

    assert (made.mode, made.overlay_cluster_size) == ("full", 65536)


def test_flavor_s_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast' is not one of falloc, full, metadata"):
        opts.preallocator_from(configured()).with_mode("fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("keep_free", ["0", "10G", "5%", "1%,10G"])
def test_space_is_kept_free_of_disks_that_exist_and_of_no_others(keep_free: str) -> None:
    conf = configured(section(keep_free=keep_free))

    making = opts.preallocator_from(conf)

    assert making.keep_free == 0
    assert opts.for_existing(conf, making) == dataclasses.replace(making, keep_free=keep_free)


def test_registering_twice_is_harmless() -> None:
    conf = configured()

    opts.register(conf)

    assert conf.imgprealloc.mode == "falloc"


@pytest.mark.parametrize("option", opts.OPTIONS, ids=lambda option: option.name)
def test_wrong_option_is_told_when_a_service_starts(option: cfg.Opt) -> None:
    conf = configured(section(**{option.name: "wrong"}))

    with pytest.raises(cfg.ConfigFileValueError, match=option.name):
        opts.validate(conf)


def test_right_configuration_is_valid() -> None:
    opts.validate(configured())


def test_list_opts_names_every_option_under_its_section() -> None:
    [(group, options)] = opts.list_opts()

    assert group.name == "imgprealloc"
    assert {option.name for option in options} == set(configured().imgprealloc)


def test_every_option_is_explained_in_whole_sentences() -> None:
    for option in opts.OPTIONS:
        assert (option.help or "").strip().endswith("."), option.name


@pytest.fixture
def sample() -> str:
    """Return what oslo-config-generator --namespace imgprealloc prints."""
    conf = cfg.ConfigOpts()
    generator.register_cli_opts(conf)
    conf(["--namespace", "imgprealloc"], default_config_files=[], default_config_dirs=[])
    printed = io.StringIO()
    installed = any(
        point.name == "imgprealloc"
        for distribution in metadata.distributions()
        for point in distribution.entry_points
        if point.group == "oslo.config.opts"
    )
    if installed:
        generator.generate(conf, printed)
    else:
        loaders = [("imgprealloc", opts.list_opts)]
        with fixtures.MockPatchObject(generator, "_get_raw_opts_loaders", lambda namespaces: loaders):
            generator.generate(conf, printed)
    return printed.getvalue()


def test_generated_sample_has_every_option_at_its_default(sample: str) -> None:
    settings = dict(re.findall(r"^#(\w+) = (.*)$", sample, re.MULTILINE))

    assert settings == {
        "mode": "falloc",
        "on_unsupported": "metadata",
        "existing_disks": "reserve",
        "protect_from_discard": "true",
        "heal_interval": "600",
        "overlay_cluster_size": "131072",
        "overlay_subclusters": "unallocated",
        "keep_free": "1%,10G",
    }


def test_generated_sample_uncommented_is_a_valid_configuration(sample: str) -> None:
    conf = configured(re.sub(r"^#(\w+ = )", r"\1", sample, flags=re.MULTILINE))

    assert dict(conf.imgprealloc) == dict(configured().imgprealloc)


@pytest.mark.parametrize("choice", ["falloc", "full", "metadata", "error", "reserve", "rewrite", "copied"])
def test_generated_sample_explains_every_choice(sample: str, choice: str) -> None:
    assert re.search(rf"^# {choice} - \S.+", sample, re.MULTILINE)
