# SPDX-License-Identifier: Apache-2.0
"""Whether a disk is there, and whether it is new. The only place that tells.

A look that fails is no proof that a disk is absent: os.path.exists() is False
for EIO, ESTALE and EACCES too (Nova bug 2152581), and NFS remembers for a while
that a name was free.
"""

from __future__ import annotations

import contextlib
import os


def is_there(path: str) -> bool:
    """Whether there is a file at path, or it cannot be told that there is none."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def was_absent(path: str) -> bool:
    """Prove that there is no file at path: neither its name nor its folder knows of one.

    Nothing is made there for that: what could not be removed again would be
    taken for the disk.

    :returns: False where it cannot be proven
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError:
        return False
    else:
        return False
    try:
        # Read anew from a server, where a name may be remembered as free.
        return os.path.basename(path) not in os.listdir(os.path.dirname(path) or ".")
    except (FileNotFoundError, NotADirectoryError):
        # There is no folder.
        return True
    except OSError:
        return False


def remove_same(path: str, status: os.stat_result) -> bool:
    """Remove the file at path if it is a certain one and no other; whether it was.

    :param status: what stat(2) has said of that
    """
    with contextlib.suppress(OSError):
        if os.path.samestat(os.lstat(path), status):
            os.unlink(path)
            return True
    return False
