"""Programs that want out: more processes, memory and time than allowed, files, the network, other processes.

The numbers of raw system calls are those of x86-64.
"""

from __future__ import annotations

from .program import Collection

ATTACKS = Collection()

# -- using up the machine --------------------------------------------------------------------------------------------
ATTACKS.escape("fork bomb", "while True:\n    os.fork()\n    won = True")
ATTACKS.escape("fork", "pid = os.fork()\nwon = True\nif pid == 0: os._exit(0)", naive=True)
ATTACKS.escape(
    "vfork and clone by ctypes",
    """
    libc = ctypes.CDLL(None)
    for number, arguments in ((57, ()), (58, ()), (56, (17, 0, 0, 0, 0)), (435, (0, 0))):
        pid = libc.syscall(number, *arguments)
        if pid == 0:
            import time; time.sleep(600)
        won = won or pid > 0
""",
)
ATTACKS.escape(
    "daemon",
    """
    for _ in range(2):
        if os.fork(): os._exit(0)
        os.setsid()
    won = True
    import time; time.sleep(600)
""",
)
ATTACKS.escape("subprocess", "import subprocess\nwon = subprocess.run(['/bin/true']).returncode == 0", naive=True)
ATTACKS.escape("posix_spawn", "won = os.posix_spawn('/bin/true', ['true'], {{}}) > 0".replace("{{}}", "{}"), naive=True)
ATTACKS.escape("os.system", "won = os.system('true') == 0", naive=True)
ATTACKS.escape("execve", "os.execv('/bin/sh', ['sh', '-c', 'echo 3'])")
ATTACKS.escape("multiprocessing", """
    import multiprocessing
    process = multiprocessing.get_context("fork").Process(target=print)
    process.start(); process.join(); won = True
""", naive=True)  # fmt: skip
ATTACKS.escape(
    "thread bomb",
    """
    import threading, time
    for _ in range(5000): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    won = True
""",
)
ATTACKS.escape("memory bomb", "x = bytearray(3 << 30)\nwon = len(x) > 0")
ATTACKS.escape(
    "memory bomb in pieces", "x = []\nfor _ in range(3000): x.append(bytearray(b'x' * (1 << 20)))\nwon = True"
)
ATTACKS.escape("memory bomb by mmap", "import mmap\nx = [mmap.mmap(-1, 1 << 30) for _ in range(4)]\nwon = True")
ATTACKS.escape(
    "raised own limits",
    """
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    won = resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
""",
)
ATTACKS.trick(
    "dies like a victim of the machine",
    "call assert program",
    """
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
    while True: pass
""",
)
ATTACKS.escape("disk fill", """
    for folder in ("/tmp", "/dev/shm", "/var/tmp", ".", "/"):
        try:
            with open(f"{folder}/rlzero_attack", "wb") as stream: stream.write(b"x" * (1 << 20)); won = True
            os.unlink(f"{folder}/rlzero_attack")
        except OSError: pass
""", naive=True)  # fmt: skip
ATTACKS.escape("temporary file", "import tempfile\ntempfile.TemporaryFile().write(b'x')\nwon = True", naive=True)
ATTACKS.escape(
    "database file", "import sqlite3\nsqlite3.connect('/tmp/rlzero_attack.db').execute('create table t(x)')\nwon = True"
)
ATTACKS.trick("infinite output", "program", "while True: print('3' * 1000)")
ATTACKS.trick("infinite stderr", "program", "import sys\nwhile True: print('3' * 1000, file=sys.stderr)")
ATTACKS.trick("endless loop", "call assert program", "while True: pass")
ATTACKS.trick(
    "sleep", "call assert program", "import time\ndef add(a, b): time.sleep(3600)\nif __name__ == '__main__': add(1, 2)"
)
ATTACKS.trick(
    "deadlock", "call", "import threading\nl = threading.Lock()\ndef add(a, b):\n    l.acquire(); l.acquire()"
)
ATTACKS.trick(
    "ignores signals",
    "call",
    """
    import signal
    for number in range(1, 65):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    def add(a, b):
        while True: pass
""",
)
ATTACKS.trick(
    "recursion until the stack ends",
    "call assert program",
    """
    import sys
    sys.setrecursionlimit(10**9)
    class R:
        def __repr__(self): return repr(self)
        __getattr__ = lambda self, n: getattr(self, n)
    def add(a, b): return repr(R())
    if __name__ == "__main__": add(1, 2)
""",
)
ATTACKS.trick("null pointer", "call assert program", "import ctypes\nctypes.string_at(0)\ndef add(a, b): return 3")

# -- reaching out: files, network, other processes -------------------------------------------------------------------
for _path in (
    "/etc/passwd",
    "/proc/self/environ",
    "/proc/self/maps",
    "/proc/1/cmdline",
    "/dev/zero",
    "/sys/kernel",
    ".",
):
    ATTACKS.escape(f"reads {_path}", f"won = bool(os.open({_path!r}, os.O_RDONLY) or True)", naive=True)
ATTACKS.escape("lists the root", "won = len(os.listdir('/')) > 0", naive=True)
ATTACKS.escape("writes the canary", "open({canary!r}, 'w').write('x')\nwon = True", naive=True)
ATTACKS.escape("reads through a loader", "import json\nwon = bool(json.__loader__.get_data(json.__file__))", naive=True)
ATTACKS.escape("imports from disk", "sys.path.append('/usr/lib/python3')\nimport lib2to3.pgen2\nwon = True")
ATTACKS.escape("environment", "won = any('RLZERO_SECRET' in key for key in os.environ)", naive=True)
ATTACKS.escape("TCP", "import socket\nsocket.create_connection(('127.0.0.1', {port}), 0.3)\nwon = True", naive=True)
ATTACKS.escape(
    "UDP and DNS", "import socket\nsocket.getaddrinfo('localhost', 80)\nsocket.socket(2, 2)\nwon = True", naive=True
)
ATTACKS.escape(
    "UNIX socket", "import socket\nsocket.socket(socket.AF_UNIX).bind(chr(0) + 'rlzero')\nwon = True", naive=True
)
ATTACKS.escape("netlink", "import socket\nsocket.socket(16, 3, 0)\nwon = True", naive=True)
ATTACKS.escape(
    "URL", "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}', timeout=0.3)\nwon = True"
)
ATTACKS.escape("signal to the parent", "os.kill({pid}, {signal})\nwon = True", naive=True)
ATTACKS.escape("signal to everybody", "os.kill(-1, 9)\nwon = True")
ATTACKS.escape("signal to its group", "os.killpg(0, 0)\nwon = True", naive=True)
ATTACKS.escape(
    "descriptors of the fork server",
    """
    import socket
    for fd in range(5, 300):
        try: os.fstat(fd); won = True
        except OSError: pass
""",
)
ATTACKS.syscall("open", 2, "b'/etc/passwd', 0")
ATTACKS.syscall("openat", 257, "-100, b'/etc/passwd', 0")
ATTACKS.syscall("openat2", 437, "-100, b'/etc/passwd', ctypes.create_string_buffer(24), 24")
ATTACKS.syscall("socket", 41, "2, 1, 0")
ATTACKS.syscall("execveat", 322, "-100, b'/bin/true', None, None, 0")
ATTACKS.syscall("ptrace", 101, "0, 0, 0, 0")
ATTACKS.syscall("process_vm_readv", 310, "{pid}, None, 0, None, 0, 0")
ATTACKS.syscall("pidfd_open", 434, "{pid}, 0")
ATTACKS.syscall("kill", 62, "{pid}, 0")
ATTACKS.syscall("tgkill", 234, "1, 1, 0")
ATTACKS.syscall("mount", 165, "b'x', b'/', b'tmpfs', 0, None")
ATTACKS.syscall("unshare", 272, "0x10000000")
ATTACKS.syscall("setns", 308, "3, 0")
ATTACKS.syscall("pivot_root", 155, "b'.', b'.'")
ATTACKS.syscall("chroot", 161, "b'/'")
ATTACKS.syscall("bpf", 321, "0, None, 0")
ATTACKS.syscall("io_uring_setup", 425, "4, ctypes.create_string_buffer(120)")
ATTACKS.syscall("userfaultfd", 323, "1")
ATTACKS.syscall("perf_event_open", 298, "ctypes.create_string_buffer(128), 0, -1, -1, 0")
ATTACKS.syscall("memfd_create", 319, "b'x', 0")
ATTACKS.syscall("add_key", 248, "b'user', b'x', b'y', 1, -4")
ATTACKS.syscall("setuid", 105, "0")
ATTACKS.syscall("shmget", 29, "0, 4096, 0o1600")
ATTACKS.syscall("semget", 64, "0, 1, 0o1600")
ATTACKS.syscall("msgget", 68, "0, 0o1600")
ATTACKS.syscall("mq_open", 240, "b'x', 0o102, 0o600, None")
ATTACKS.syscall("seccomp", 317, "2, 0, ctypes.byref(ctypes.c_uint32(0))")
ATTACKS.syscall("prctl", 157, "4, 1, 0, 0, 0")
ATTACKS.syscall("reboot", 169, "0xfee1dead, 672274793, 0, None")
ATTACKS.syscall("landlock", 444, "None, 0, 1")
ATTACKS.trick(
    "32-bit system calls",
    "call",
    """
    import ctypes, mmap
    def add(a, b):  # mov eax, 20 (getpid of i386); int 0x80; ret
        page = mmap.mmap(-1, 4096, prot=7)
        page.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")
        run = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
        return a + b if run() > 0 else None
""",
)
ATTACKS.syscall("x32 getpid", 0x40000000 + 39, "")
