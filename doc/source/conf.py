# SPDX-License-Identifier: Apache-2.0
"""Sphinx's configuration."""

import logging
import pathlib

project = "imgprealloc"
author = "imgprealloc maintainers"
copyright = author

extensions = [
    "cliff.sphinxext",
    "openstackdocstheme",
    "oslo_config.sphinxconfiggen",
    "oslo_config.sphinxext",
    "reno.sphinxext",
    "sphinx.ext.autodoc",
]

# Release notes are read from Git's history, which a tarball has not, unless in reno's own file.
_REPOSITORY = pathlib.Path(__file__).parents[2]
if not any((_REPOSITORY / name).exists() for name in (".git", "releasenotes/notes/reno.cache")):
    extensions.remove("reno.sphinxext")
    exclude_patterns = ["releasenotes.rst"]
    suppress_warnings = ["ref.doc", "toc.excluded"]

html_theme = "openstackdocs"
# No readers are counted, and no badge is fetched.
html_theme_options = {"analytics_tracking_code": "", "display_badge": False}
html_static_path = ["css"]
html_css_files = ["pages.css"]
# The theme's own licence is that of OpenStack's documentation.
templates_path = ["templates"]
# No project of OpenStack's, with neither a place on its Git server nor a bug tracker there.
openstackdocs_auto_name = False
openstackdocs_repo_name = ""
# A tarball has no commit to tell of, and is not the worse for it.
logging.getLogger("sphinx.openstackdocstheme.ext").addFilter(lambda record: "gitsha" not in record.getMessage())

# The sample of nova.conf's section, which configuration.rst includes.
config_generator_config_file = [("config-generator.conf", "_static/imgprealloc")]

# Diagrams of words, and what programs print, are no Python.
highlight_language = "text"

autoprogram_cliff_application = "imgprealloc"
autoprogram_cliff_app_dist_name = "imgprealloc"
# What every cliff command with a table has, which command.rst says once.
autoprogram_cliff_ignored = [
    "--help",
    "--quote",
    "--noindent",
    "--max-width",
    "--fit-width",
    "--print-empty",
    "--sort-ascending",
    "--sort-descending",
]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
