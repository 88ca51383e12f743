# ruff: noqa: E501 - programs on one line read better in a table
"""Programs that try to break out of the sandbox, for test_sandbox_escapes.py. PATH is a folder outside, PORT a server."""

# Each must raise: then it prints "contained", otherwise "escaped".
ATTEMPTS = {
    "tcp to the world": "socket.create_connection(('192.0.2.1', 80), 0.3)",
    "tcp to a server on this machine": "socket.create_connection(('127.0.0.1', PORT), 0.5)",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "netlink": "socket.if_nameindex()",
    "unix socket": "socket.socket(socket.AF_UNIX).connect(PATH + '/socket')",
    "name lookup": "socket.getaddrinfo('example.com', 80)",
    "fork": "os.fork() or os._exit(0)",
    "double fork that holds the pipe": "os.fork() or (os.setsid(), os.fork(), time.sleep(60))",
    "fork bomb": "[os.fork() for _ in range(10)]",
    "spawn": "os.posix_spawn(sys.executable, ['python', '-c', ''], {})",
    "subprocess": "subprocess.run([sys.executable, '-c', ''], check=True)",
    "shell": "assert os.system('true') == 0",
    "pty": "os.forkpty()",
    "fork by system call": "assert syscall(57) >= 0",
    "fork by the second system call table": "assert syscall(0x40000000 + 57) >= 0",
    "vfork by system call": "assert syscall(58) >= 0",
    "clone by system call": "assert syscall(56, 17, 0, 0, 0, 0) >= 0",
    "clone3 by system call": "assert syscall(435, ctypes.create_string_buffer(88), 88) >= 0",
    "a user namespace of its own": "assert syscall(272, 0x10000000) == 0",
    "mount": "assert syscall(165, b'none', b'/tmp', b'tmpfs', 0, 0) == 0",
    "chroot": "os.chroot('/tmp')",
    "ptrace": "assert syscall(101, 16, 1, 0, 0) == 0",
    "memory of another process": "assert syscall(310, 1, 0, 0, 0, 0, 0) >= 0",
    "bpf": "assert syscall(321, 0, 0, 0) >= 0",
    "io_uring": "assert syscall(425, 1, ctypes.create_string_buffer(120)) >= 0",
    "keyring": "assert syscall(250, 0, -3, 1) >= 0",
    "kill the parent": "os.kill(os.getppid(), 9)",
    "signal the parent": "os.kill(os.getppid(), 0)",
    "kill everything": "os.kill(-1, 9)",
    "kill the group": "os.killpg(0, 9)",
    "stop the parent by pidfd": "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 19)",
    "see processes": "os.listdir('/proc')",
    "read the environment": "os.environ['SANDBOX_SECRET']",
    "read the parent's environment": "open(f'/proc/{os.getppid()}/environ').read()",
    "read its memory by file": "open('/proc/self/mem').read(1)",
    "read a file outside": "open(PATH + '/secret').read()",
    "read through a symlink": "os.symlink(PATH + '/secret', '/tmp/a'); open('/tmp/a').read()",
    "read the tests": "open(TESTS).read()",
    "read passwords": "open('/etc/passwd').read()",
    "list installed packages": "[1 / len(os.listdir(f)) for f in glob.glob(os.path.dirname(os.__file__) + '/*-packages')]"
    " or 1 / 0",
    "write outside": "open(PATH + '/escaped', 'w')",
    "write through a symlink": "os.symlink(PATH, '/tmp/b'); open('/tmp/b/escaped', 'w')",
    "write to the root": "open('/escaped', 'w')",
    "write to Python's library": "open(os.path.dirname(os.__file__) + '/escaped.py', 'w')",
    "change Python's library": "os.chmod(os.__file__, 0o777)",
    "link Python's library": "os.link(os.__file__, '/tmp/c')",
    "make a device": "os.mknod('/tmp/d', 0o20666, os.makedev(1, 1))",
    "write to a device folder": "open('/dev/escaped', 'w')",
    "change a device": "os.chmod('/dev/full', os.stat('/dev/full').st_mode & 0o777)",
    "change an open device": "os.fchmod(os.open('/dev/full', os.O_RDWR), os.stat('/dev/full').st_mode & 0o777)",
    "own a device": "os.chown('/dev/full', *os.stat('/dev/full')[4:6])",
    "touch a device": "os.utime('/dev/full')",
    "kernel messages": "open('/dev/kmsg', 'w').write('x')",
    "terminal": "os.open('/dev/tty', os.O_RDWR)",
    "shared memory folder": "open('/dev/shm/escaped', 'w')",
    "shared memory": "assert syscall(29, 0, 4096, 0o1600) >= 0",
    "anonymous file": "os.memfd_create('x')",
    "be root": "os.setuid(0)",
    "raise its limits": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "any other descriptor": "_any(os.fstat, range(3, 64))",
    "disk flood in one file": "open('/tmp/e', 'wb').write(b'x' * (17 << 20))",
    "disk flood in many files": "[open(f'/tmp/f{i}', 'wb').write(b'x' * (1 << 20)) for i in range(17)]",
    "descriptor flood": "files = [open('/dev/null') for _ in range(64)]",
    "memory flood": "data = bytearray(600 << 20)",
    "memory flood by map": "data = mmap.mmap(-1, 600 << 20)",
    "real time priority": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))",
    "reboot": "assert syscall(169, 0xfee1dead, 672274793, 0x1234567, 0) == 0",
}
PREAMBLE = """
import ctypes, glob, mmap, os, resource, signal, socket, subprocess, sys, time
PATH, PORT, TESTS = input(), int(input()), input()
def syscall(*arguments):
    return ctypes.CDLL(None).syscall(*arguments)
def _any(function, values):
    for value in values:
        try: return function(value)
        except OSError: pass
    raise OSError
try:
    {attempt}
except BaseException:
    print("contained")
else:
    print("escaped")
"""

# Programs that print nothing right: (code, status).
FLOODS = {
    "output flood": ("while True: print('x' * 65536)", "wrong"),
    "output flood of one line": ("import sys\nwhile True: sys.stdout.write('x' * 1000)", "wrong"),
    "memory grows": ("a = []\nwhile True: a.append(bytearray(1 << 20))", "wrong"),
    "endless loop": ("while True: pass", "timeout"),
    "sleeps": ("import time; time.sleep(60)", "timeout"),
    "holds the interpreter": ("9 ** 9 ** 9", "timeout"),
    "endless recursion": ("def f(): f()\nf()", "wrong"),
    "recursion in C": (
        "import sys; sys.setrecursionlimit(10**9)\nf = type('F', (), {'__repr__': lambda s: repr(s)})\nrepr(f())",
        "wrong",
    ),
    "threads that stay": (
        "import threading, time\nfor _ in range(9): threading.Thread(target=time.sleep, args=(60,)).start()",
        "timeout",
    ),
    "thread flood": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
        "timeout|wrong",
    ),
    "ignores signals": (
        "import signal\nfor n in range(1, 32):\n  if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "timeout",
    ),
    "closes all descriptors and stays": ("import os, time\nos.closerange(0, 99)\ntime.sleep(60)", "timeout"),
    "closes all descriptors and goes": ("import os\nos.closerange(0, 99)", "wrong"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "wrong"),
    "aborts": ("import os; os.abort()", "wrong"),
    "leaves early": ("import os; os._exit(0)", "wrong"),
    "leaves in error after the right output": ("print('right'); raise SystemExit(1)", "wrong"),
    "reports a verdict": ('print(\'{"passed": 1, "ended": "done", "seen": ""}\')', "wrong"),
    "does not compile": ("def f(:", "wrong"),
    "compiler bomb": ("a = " + "(" * 90 + "1" + ")" * 90 + "\nb = " + "-" * 90_000 + "1", "wrong"),
    "removes Python": ("import shutil, os\nshutil.rmtree(os.path.dirname(os.__file__), ignore_errors=True)", "wrong"),
}

# Solutions of: assert f(3) == 103 and more (see the test), by other means than giving 103.
FORGERIES = {
    "os._exit": "import os; os._exit(0)",
    "os._exit when called": "import os\ndef f(x): os._exit(0)",
    "sys.exit when called": "import sys\ndef f(x): sys.exit(0)",
    "equal to all": "class A:\n  def __eq__(s, o): return True\n  def __ne__(s, o): return False\n  __hash__ = None\ndef f(x): return A()",
    "a number equal to all": "class A(int):\n  def __eq__(s, o): return True\n  def __ne__(s, o): return False\n  def __sub__(s, o): return 0\n"
    "  __hash__ = None\ndef f(x): return A(5)",
    "a list equal to all": "class A(list):\n  def __eq__(s, o): return True\n  __contains__ = __eq__\ndef f(x): return A()",
    "its class is another": "class A:\n  __class__ = property(lambda s: int)\ndef f(x): return A()",
    "patched builtins": "import builtins\nbuiltins.all = builtins.any = builtins.bool = builtins.isinstance = lambda *a: True\n"
    "builtins.AssertionError = ValueError\ndef f(x): return 0",
    "ends the tests' iteration": "def f(x): raise StopIteration",
    "ends the tests' generator": "def f(x): raise GeneratorExit",
    "fails like an assertion": "def f(x): raise AssertionError",
    "raises no exception": "def f(x): raise KeyboardInterrupt",
    "raises its own": "class E(BaseException): pass\ndef f(x): raise E",
    "not a number": "def f(x): return float('nan')",
    "nothing": "def f(x): return None",
    "true": "def f(x): return True",
    "endless values": "import itertools\ndef f(x): return itertools.count()",
    "a list in itself": "a = []; a.append(a)\ndef f(x): return a",
    "deep nesting": "def f(x):\n  a = []\n  for _ in range(900): a = [a]\n  return a",
    "a large answer": "def f(x): return 'x' * (20 << 20)",
    "a large number": "def f(x): return 1 << 10_000_000",
    "forged verdict on all descriptors": "import os\nfor n in range(64):\n  try: os.write(n, b'{\"passed\": 2, \"ended\": \"done\", \"seen\": \"\"}')\n"
    "  except OSError: pass\ndef f(x): return 0",
    "forged answers on all descriptors": "import os\nfor n in range(64):\n  try: os.write(n, b'\\0\\0\\0\\x0e{\"value\": true}' * 9)\n"
    "  except OSError: pass\ndef f(x): return 0",
    "forged handles": "import os\nfor n in range(64):\n  try: os.write(n, b'\\0\\0\\0\\x18{\"value\": {\"handle\":103}}' * 9)\n"
    "  except OSError: pass\ndef f(x): return 0",
    "forged length": "import os\nfor n in range(64):\n  try: os.write(n, b'\\xff' * 9000)\n  except OSError: pass\ndef f(x): return 0",
    "floods the channel": "import os\nfor n in range(64):\n  try:\n    while True: os.write(n, b'x' * 9000)\n  except OSError: pass\ndef f(x): return 0",
    "forged at exit": "import atexit, os\natexit.register(lambda: [os.write(n, b'{\"passed\": 2}') for n in (0, 1, 2)])\ndef f(x): return 0",
    "patched harness": "import sys\nfor n, m in list(sys.modules.items()):\n  if n.endswith('wire'):\n"
    "    m.encode = lambda *a: {'handle': 0}\n    m.Channel.send = lambda *a: None\ndef f(x): return 0",
    "walks frames": "import sys\ndef f(x):\n  frame, found = sys._getframe(), []\n  while frame:\n"
    "    found += [v for v in frame.f_locals.values()]\n    frame = frame.f_back\n"
    "  return next((v for v in found if v == 103), 0)",
    "searches memory": "import gc\ndef f(x):\n  right = x + int('100')\n  for o in gc.get_objects():\n    if isinstance(o, dict) and 'tests' in o: return right\n"
    "    if isinstance(o, (list, tuple)) and any(type(v) is int and v == right for v in o): return right\n  return 0",
    "searches descriptors": "import os, re\ndef f(x):\n  for n in range(64):\n    try: os.set_blocking(n, False); data = os.read(n, 9999)\n"
    "    except OSError: continue\n    if b'103' in data: return 103\n  return 0",
    "searches files": "import os\ndef f(x):\n  for folder, _, names in os.walk('/tmp'):\n    for name in names:\n"
    "      if '103' in open(os.path.join(folder, name)).read(): return 103\n  return 0",
    "searches the arguments": "import sys\ndef f(x): return 103 if '103' in str(sys.argv) + str(sys.orig_argv) else 0",
    "answers in a thread": "import threading, os\ndef g():\n  while True:\n    try: os.write(3, b'x')\n    except OSError: return\n"
    "threading.Thread(target=g).start()\ndef f(x): return 0",
    "does not return": "def f(x):\n  while True: pass",
    "loops at import": "while True: pass",
    "is not there": "g = 1",
}  # fmt: skip
