# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the modules in tools/ and beside the tests can be imported."""

import pathlib
import sys

_HERE = pathlib.Path(__file__).parent

sys.path[:0] = [str(_HERE), str(_HERE.parent / "tools")]
