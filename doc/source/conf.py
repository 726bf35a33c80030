# SPDX-License-Identifier: Apache-2.0
"""Sphinx's configuration."""

project = "imgprealloc"
author = "imgprealloc maintainers"
html_theme = "alabaster"
