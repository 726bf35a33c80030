# SPDX-License-Identifier: Apache-2.0
"""Sphinx's configuration."""

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

html_theme = "openstackdocs"
html_theme_options = {"display_global_toc_section": True, "sidebar_mode": "toctree"}
# No project of OpenStack's, with neither a place on its Git server nor a bug tracker there.
openstackdocs_auto_name = False
openstackdocs_repo_name = ""

# The sample of nova.conf's section, which configuration.rst includes.
config_generator_config_file = [("config-generator.conf", "_static/imgprealloc")]

# Diagrams of words, and what programs print, are no Python.
highlight_language = "text"

autoprogram_cliff_application = "imgprealloc"
autoprogram_cliff_app_dist_name = "imgprealloc"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
