# SPDX-License-Identifier: Apache-2.0
"""The library's decisions and errors, with every program played by host.py."""
