"""A sandbox for Python that a model wrote, on Linux, without root.

- `isolated`: user, process, mount, network, IPC and host name namespaces of its own (bubblewrap). In them a program is
  nobody, has no environment and no /proc, reads only Python's own library and the system's, and writes only to a
  private /tmp of 16 MiB in memory; all that it started dies with it. And all that `limited` has:
- `limited`: limits on CPU, wall time, memory, files and output; a session and process group of its own, killed at the
  end; no environment; a working folder that is deleted; and a seccomp filter (x86-64, aarch64) that forbids new
  processes, sockets, signals, ptrace, and memory that no limit counts.
- `none`: the machine gives neither, and no program is run.

What `limited` cannot contain: reading what this user can read (home, project, data sets, the environment and memory of
this user's processes in /proc, hence keys and expected answers); writing what this user can write (as root:
everything), /proc/PID/mem of its processes and so verdicts included; filling the disk with many files. On other
machines than the two named also: the network, signals to this user's processes, fork bombs, memory that is shared or
has no address, and survivors that leave the process group.

What `isolated` bounds by time only: the kernel's memory for threads and for empty files in /tmp. What no level hides:
Python's standard library, the kernel's version, the number of processors, the time, and that it is observed.
"""

from lightning_rlvr.rewards.sandbox.probe import Ground, Level, probe
from lightning_rlvr.rewards.sandbox.process import End, Limits, Process, Program, Run
from lightning_rlvr.rewards.sandbox.sandbox import Sandbox

__all__ = ["End", "Ground", "Level", "Limits", "Process", "Program", "Run", "Sandbox", "probe"]
