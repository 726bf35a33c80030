# SPDX-License-Identifier: Apache-2.0
"""Sphinx's configuration for the man page alone, so that packages need nothing but Sphinx to build it."""

project = "imgprealloc"
author = "imgprealloc maintainers"
root_doc = "imgprealloc"
man_pages = [(root_doc, "imgprealloc", "preallocated instance disks for OpenStack Nova", [author], 1)]
