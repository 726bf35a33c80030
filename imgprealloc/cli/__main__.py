# SPDX-License-Identifier: Apache-2.0
"""python -m imgprealloc.cli."""

import sys

from imgprealloc import cli

sys.exit(cli.main())
