"""Programs that try to be paid without solving the task, or to reach out of the sandbox. None may succeed.

The task is always `add(a, b)`. A program that tries to escape answers rightly *only if its escape worked*, so a verdict
`correct` is a success of the attack; so is `error` (a sample that escapes its zero), and so is an effect that a witness
outside sees (a file, a connection, a signal, a process). `run_attacks` prints nothing and returns one row per program;
`python -m rewards.sandbox.attacks` prints them for the machine it runs on.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rewards.code import AssertTests, CallTests, ProgramTests, Tests, check
from rewards.sandbox import Limits, Sandbox, SandboxError

Kind = Literal["call", "assert", "program"]


@dataclass(frozen=True)
class Attack:
    """`naive`: whether it beats the checker that most people write first (exec the code, run the asserts, print)."""

    name: str
    kind: Kind
    code: str
    naive: bool = False


ATTACKS: list[Attack] = []

_TESTS: dict[Kind, Tests] = {
    "call": CallTests("add", [((1, 2), {}), ((40, 5), {}), ((-3, 3), {})], [3, 45, 0]),
    "assert": AssertTests([
        "assert add(1, 2) == 3\nassert set([add(40, 5)]) == set([45])\nassert abs(add(-3, 3)) < 1e-9\n"
        "for got, want in zip(map(add, [1, 2], [3, 4]), [4, 6]):\n    assert got == want\n"
        "assert sorted([add(2, 2), 1]) == [1, 4] and len([add(0, 1)]) == 1 and add(8, 8) != 17\n"
        "assert isinstance(add(1, 1), int) and not add(0, 0)"
    ]),
    "program": ProgramTests(["1 2\n", "40 5\n"], ["3\n", "45\n"]),
}  # fmt: skip


def _attack(name: str, kind: Kind | str, code: str, naive: bool = False) -> None:
    for one in kind.split():
        ATTACKS.append(Attack(name, one, textwrap.dedent(code).strip() + "\n", naive and one != "program"))


def _escape(name: str, attempt: str, naive: bool = False, kind: str = "call") -> None:
    """The attempt must raise or leave `won` false to be harmless; the answer is right only when it won."""
    body = textwrap.indent(textwrap.dedent(attempt).strip(), "        ")
    _attack(name, kind, f"import os, sys, ctypes\ndef add(a, b):\n    won = False\n    try:\n{body}\n"
            "    except Exception:\n        pass\n    return a + b if won else None", naive)  # fmt: skip


def _syscall(name: str, number: int, arguments: str, won: str = "r >= 0") -> None:
    _escape(
        f"raw syscall {name}",
        f"libc = ctypes.CDLL(None, use_errno=True)\nr = libc.syscall({number}, {arguments})\nwon = {won}",
    )


# -- objects that are not what they seem -----------------------------------------------------------------------------
_attack("equals everything", "call assert", """
    class E:
        def __eq__(self, other): return True
        def __ne__(self, other): return True
        def __lt__(self, other): return True
        def __gt__(self, other): return True
        def __hash__(self): return hash(45)
        def __abs__(self): return 0
        def __bool__(self): return False
        __class__ = int
    def add(a, b): return E()
""")
for _base in ("int", "float", "str", "dict", "list", "tuple"):
    _attack(f"subclass of {_base}", "call assert", f"""
        class E({_base}):
            def __eq__(self, other): return True
            def __ne__(self, other): return True
            def __lt__(self, other): return True
            def __hash__(self): return hash(45)
            def __bool__(self): return False
            def __abs__(self): return 0
        def add(a, b): return E()
    """)
_attack("mock.ANY", "call", "from unittest.mock import ANY\ndef add(a, b): return ANY", naive=True)
_attack("MagicMock", "call assert", """
    from unittest.mock import MagicMock
    def add(a, b):
        m = MagicMock()
        m.__eq__ = lambda self, other: True
        m.__hash__ = lambda self: hash(45)
        return m
""")
_attack("metaclass", "call assert", """
    class M(type):
        def __eq__(cls, other): return True
        def __hash__(cls): return hash(45)
        __name__ = "int"
    class int(metaclass=M): pass
    def add(a, b): return int
""")
_attack("answers stacked in a generator", "call assert", "def add(a, b):\n    yield from range(-1000, 1000)")
_attack("NaN", "call assert", "def add(a, b): return float('nan')")
_attack("every candidate at once", "call assert", "def add(a, b): return set(range(-100, 100))")
_attack("right value, wrong type", "call", "def add(a, b): return float(a + b)", naive=True)
_attack("bool for int", "call", "def add(a, b): return {3: 3, 45: 45, 0: False}[a + b]", naive=True)

# -- looking for the answers -----------------------------------------------------------------------------------------
_attack("frame walking", "call assert", """
    import sys
    def add(a, b):
        frame = sys._getframe()
        while frame:
            for scope in (frame.f_locals, frame.f_globals):
                for name in ("expected", "want", "answers", "outputs", "tests"):
                    if name in scope:
                        found = scope[name]
                        return found[0] if isinstance(found, (list, tuple)) else found
            frame = frame.f_back
""")
_attack("constants of the caller", "call assert", """
    import sys
    def add(a, b):
        frame = sys._getframe(1)
        numbers = [c for c in frame.f_code.co_consts if type(c) is int]
        return next((c for c in numbers if c == a + b), None)
""", naive=True)  # fmt: skip
_attack("searching the heap", "call assert", """
    import gc
    def add(a, b):
        for thing in gc.get_objects():
            if type(thing) is dict:
                for value in list(thing.values()):
                    if type(value) is str and ("assert " + "add(") in value:
                        return a + b
                    if type(value) is list and value == [3, 45, 0]:
                        return a + b
""")
_attack("sources of the tests", "call assert", """
    import inspect, linecache, sys
    def add(a, b):
        for frame in inspect.stack():
            if "add(" in "".join(frame.code_context or [])  and "== " in "".join(frame.code_context or []):
                return a + b
        for name, module in list(sys.modules.items()):
            if hasattr(module, "expected") or hasattr(module, "EXPECTED"):
                return a + b
""")

# -- patching what checks --------------------------------------------------------------------------------------------
_attack("patched builtins", "call assert", """
    import builtins
    for name in ("all", "any", "isinstance", "len", "zip", "type", "abs", "sorted", "set"):
        setattr(builtins, name, lambda *a, **k: True)
    def add(a, b): return None
""")
_attack("names of builtins", "assert", """
    def set(x=()): return 0
    def abs(x): return 0
    def sorted(x): return [1, 4]
    def isinstance(*x): return True
    def len(x): return 1
    def zip(*x): return []
    def map(*x): return []
    def add(a, b): return 3
""")
_attack("patched protocol", "call assert", """
    import sys
    for name, module in list(sys.modules.items()):
        if name.startswith("sandbox."):
            for attribute in ("encode", "decode", "same_value", "frame"):
                if hasattr(module, attribute):
                    setattr(module, attribute, lambda *a, **k: b"\\x00\\x00\\x00\\x0f" + b'{"passed":true}')
    def add(a, b): return None
""")
_attack("patched json", "call assert", """
    import json
    json.dumps = lambda *a, **k: '{"passed": true, "test": 0, "value": true}'
    def add(a, b): return None
""")
_attack("patched operators", "call", """
    import operator, functools
    operator.eq = lambda a, b: True
    def add(a, b): return 0
""")
_attack("ctypes writes the type of int", "call assert", """
    import ctypes
    def add(a, b):
        three = id(3)
        ctypes.memmove(three + 24, (0).to_bytes(4, "little"), 4)
        return a
""")
_attack("trace function", "call assert", """
    import sys, threading
    def tracer(frame, event, arg):
        frame.f_locals["passed"] = True
        return tracer
    sys.settrace(tracer); threading.settrace(tracer)
    def add(a, b): return None
""")
_attack("mutated inputs", "call assert", """
    import ctypes
    def add(a, b):
        for number in (a, b):
            ctypes.memmove(id(number) + 24, (0).to_bytes(4, "little"), 4)
        return 0
""")

# -- ending early, or claiming success --------------------------------------------------------------------------------
for _name, _statement in {
    "sys.exit(0)": "import sys; sys.exit(0)",
    "os._exit(0)": "import os; os._exit(0)",
    "SkipTest": "import unittest; raise unittest.SkipTest('no need')",
    "StopIteration": "raise StopIteration",
    "GeneratorExit": "raise GeneratorExit",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "AssertionError": "raise AssertionError",
    "abort": "import os; os.abort()",
}.items():
    _attack(f"{_name} in the call", "call assert", f"def add(a, b):\n    {_statement}")
    _attack(f"{_name} while loading", "call assert program", f"print('PASSED')\n{_statement}\ndef add(a, b): return 3")
_attack("exception named StopIteration", "assert", """
    class E(Exception): pass
    E.__name__ = "StopIteration"
    def add(a, b): raise E
""")
_attack("PASSED on stdout", "call assert program", """
    print("PASSED\\n1 passed in 0.01s\\nOK"); print({"passed": True, "verdict": "correct"})
    def add(a, b): print("PASSED")
""")
_attack("atexit", "call assert program", """
    import atexit, os
    atexit.register(lambda: (os.write(1, b"PASSED"), os._exit(0)))
    def add(a, b): raise SystemExit
""")
_FORGE = """
    import json, os, struct
    def forge(fd, message):
        data = json.dumps(message).encode()
        try: os.write(fd, struct.pack(">I", len(data)) + data)
        except OSError: pass
"""
for _message in (
    {"passed": True}, {"test": 0, "passed": True}, {"missing": "seccomp", "why": "x"}, {"ready": True},
    {"value": ["o", 0]}, {"broken": "x", "test": 0}, {"job": 1, "refused": "x"}, {"job": 1, "status": 0, "cpu_s": 0},
):  # fmt: skip
    _attack(f"forged frame {_message}", "call assert program", _FORGE + f"""
    for fd in range(3, 20):
        for _ in range(3): forge(fd, {_message})
    def add(a, b):
        for fd in range(3, 20): forge(fd, {_message})
        os._exit(0)
    """)  # fmt: skip
_attack("answers before the questions", "assert", _FORGE + """
    for answer in (3, 45, 0, 4, 6, 4, 1, 16, 2): forge(4, {"value": answer + 1})
    def add(a, b): return 3
""")  # fmt: skip
_attack("closed channel", "call assert", "import os\ndef add(a, b):\n    os.closerange(0, 64)\n    return 3")
_attack("exchanged descriptors", "call assert", """
    import os
    spare = os.dup(3); os.dup2(1, 3); os.dup2(spare, 1)
    def add(a, b): print('{"passed": true}'); return None
""")
_attack("thread alive at return", "call assert", """
    import threading, os, time
    def work():
        while True:
            try: os.write(3, b'\\x00\\x00\\x00\\x0f{"passed": true}')
            except OSError: pass
    def add(a, b):
        threading.Thread(target=work).start()
        return None
""")

# -- attacks on whoever reads the answer -----------------------------------------------------------------------------
_attack("pickle payload", "call assert", """
    import os, pickle
    class P:
        def __reduce__(self): return (os.system, ("touch {canary}",))
    def add(a, b):
        try: os.write(3, pickle.dumps(P()))
        except OSError: pass
        return pickle.dumps(P())
""")
_attack("endless answer", "call assert", """
    import os
    def add(a, b):
        while True:
            os.write(3, b"\\x00\\x00\\x00\\x01" + b"1" )
""")
_attack("length of 4 GiB", "call assert", """
    import os
    def add(a, b):
        os.write(3, b"\\xff\\xff\\xff\\xff" + b"x" * 1000)
        return None
""")
_attack("deep nesting", "call assert", """
    import os
    def add(a, b):
        x = []
        for _ in range(50): x = [x]
        body = b'{"value":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        os.write(3, len(body).to_bytes(4, "big") + body)
        return x
""")
for _field in ("raised", "load", "value"):
    _attack(f"nesting that cannot be printed in {_field!r}", "call assert program", f"""
        import os
        body = b'{{"{_field}":' + b"[" * 985 + b"]" * 985 + b"}}"
        for fd in (3, 4):
            try: os.write(fd, len(body).to_bytes(4, "big") + body)
            except OSError: pass
        body = b'{{"{_field}":{{"type":' + b"[" * 980 + b"]" * 980 + b"}}}}"
        for fd in (3, 4):
            try: os.write(fd, len(body).to_bytes(4, "big") + body)
            except OSError: pass
        def add(a, b): return None
    """)
_attack("signalling NaN", "call assert", "import decimal\ndef add(a, b): return decimal.Decimal('sNaN')")
_attack("values that compute for ever", "call assert", """
    from decimal import Decimal
    from fractions import Fraction
    n = 0
    def add(a, b):
        global n
        n += 1
        return [Decimal("1e999999999"), Fraction(1, 3), range(0, 10**18), 10**4000, "\\ud800" * 9][n % 5]
""")
_attack("integer of a million digits", "call assert", "def add(a, b): return 1 << 3_000_000")
_attack("colliding hashes", "call assert", "def add(a, b): return {k * (2**61 - 1) for k in range(2, 20_000)}")
_attack("hanging __repr__", "call assert", """
    class R(Exception):
        def __repr__(self):
            while True: pass
        __str__ = __hash__ = __reduce__ = __del__ = __repr__
    def add(a, b): raise R
""")
_attack("lone surrogates and NUL", "call assert program", r"""
    import sys
    sys.stdout.buffer.write(b"\xff\xfe\x003\x00\n")
    def add(a, b): return "\ud800\x00" * 1000
""")

# -- using up the machine --------------------------------------------------------------------------------------------
_escape("fork bomb", "while True:\n    os.fork()\n    won = True")
_escape("fork", "pid = os.fork()\nwon = True\nif pid == 0: os._exit(0)", naive=True)
_escape("vfork and clone by ctypes", """
    libc = ctypes.CDLL(None)
    for number, arguments in ((57, ()), (58, ()), (56, (17, 0, 0, 0, 0)), (435, (0, 0))):
        pid = libc.syscall(number, *arguments)
        if pid == 0:
            import time; time.sleep(600)
        won = won or pid > 0
""")
_escape("daemon", """
    for _ in range(2):
        if os.fork(): os._exit(0)
        os.setsid()
    won = True
    import time; time.sleep(600)
""")
_escape("subprocess", "import subprocess\nwon = subprocess.run(['/bin/true']).returncode == 0", naive=True)
_escape("posix_spawn", "won = os.posix_spawn('/bin/true', ['true'], {{}}) > 0".replace("{{}}", "{}"), naive=True)
_escape("os.system", "won = os.system('true') == 0", naive=True)
_escape("execve", "os.execv('/bin/sh', ['sh', '-c', 'echo 3'])")
_escape("multiprocessing", """
    import multiprocessing
    process = multiprocessing.get_context("fork").Process(target=print)
    process.start(); process.join(); won = True
""", naive=True)  # fmt: skip
_escape("thread bomb", """
    import threading, time
    for _ in range(5000): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    won = True
""")
_escape("memory bomb", "x = bytearray(3 << 30)\nwon = len(x) > 0")
_escape("memory bomb in pieces", "x = []\nfor _ in range(3000): x.append(bytearray(b'x' * (1 << 20)))\nwon = True")
_escape("memory bomb by mmap", "import mmap\nx = [mmap.mmap(-1, 1 << 30) for _ in range(4)]\nwon = True")
_escape("raised own limits", """
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    won = resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
""")
_attack("dies like a victim of the machine", "call assert program", """
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
    while True: pass
""")
_escape("disk fill", """
    for folder in ("/tmp", "/dev/shm", "/var/tmp", ".", "/"):
        try:
            with open(f"{folder}/rlzero_attack", "wb") as stream: stream.write(b"x" * (1 << 20)); won = True
            os.unlink(f"{folder}/rlzero_attack")
        except OSError: pass
""", naive=True)  # fmt: skip
_escape("temporary file", "import tempfile\ntempfile.TemporaryFile().write(b'x')\nwon = True", naive=True)
_escape("database file", "import sqlite3\nsqlite3.connect('/tmp/rlzero_attack.db').execute('create table t(x)')\nwon = True")
_attack("infinite output", "program", "while True: print('3' * 1000)")
_attack("infinite stderr", "program", "import sys\nwhile True: print('3' * 1000, file=sys.stderr)")
_attack("endless loop", "call assert program", "while True: pass")
_attack("sleep", "call assert program", "import time\ndef add(a, b): time.sleep(3600)\nif __name__ == '__main__': add(1, 2)")
_attack("deadlock", "call", "import threading\nl = threading.Lock()\ndef add(a, b):\n    l.acquire(); l.acquire()")
_attack("ignores signals", "call", """
    import signal
    for number in range(1, 65):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    def add(a, b):
        while True: pass
""")
_attack("recursion until the stack ends", "call assert program", """
    import sys
    sys.setrecursionlimit(10**9)
    class R:
        def __repr__(self): return repr(self)
        __getattr__ = lambda self, n: getattr(self, n)
    def add(a, b): return repr(R())
    if __name__ == "__main__": add(1, 2)
""")
_attack("null pointer", "call assert program", "import ctypes\nctypes.string_at(0)\ndef add(a, b): return 3")

# -- reaching out: files, network, other processes -------------------------------------------------------------------
for _path in ("/etc/passwd", "/proc/self/environ", "/proc/self/maps", "/proc/1/cmdline", "/dev/zero", "/sys/kernel", "."):
    _escape(f"reads {_path}", f"won = bool(os.open({_path!r}, os.O_RDONLY) or True)", naive=True)
_escape("lists the root", "won = len(os.listdir('/')) > 0", naive=True)
_escape("writes the canary", "open({canary!r}, 'w').write('x')\nwon = True", naive=True)
_escape("reads through a loader", "won = bool(os.__loader__.get_data(os.__file__))", naive=True)
_escape("imports from disk", "sys.path.append('/usr/lib/python3')\nimport lib2to3.pgen2\nwon = True")
_escape("environment", "won = any('RLZERO_SECRET' in key for key in os.environ)", naive=True)
_escape("TCP", "import socket\nsocket.create_connection(('127.0.0.1', {port}), 0.3)\nwon = True", naive=True)
_escape("UDP and DNS", "import socket\nsocket.getaddrinfo('localhost', 80)\nsocket.socket(2, 2)\nwon = True", naive=True)
_escape("UNIX socket", "import socket\nsocket.socket(socket.AF_UNIX).bind(chr(0) + 'rlzero')\nwon = True", naive=True)
_escape("netlink", "import socket\nsocket.socket(16, 3, 0)\nwon = True", naive=True)
_escape("URL", "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}', timeout=0.3)\nwon = True")
_escape("signal to the parent", "os.kill({pid}, {signal})\nwon = True", naive=True)
_escape("signal to everybody", "os.kill(-1, 9)\nwon = True")
_escape("signal to its group", "os.killpg(0, 0)\nwon = True", naive=True)
_escape("descriptors of the zygote", """
    import socket
    for fd in range(5, 300):
        try: os.fstat(fd); won = True
        except OSError: pass
""")
_syscall("open", 2, "b'/etc/passwd', 0")
_syscall("openat", 257, "-100, b'/etc/passwd', 0")
_syscall("openat2", 437, "-100, b'/etc/passwd', ctypes.create_string_buffer(24), 24")
_syscall("socket", 41, "2, 1, 0")
_syscall("execveat", 322, "-100, b'/bin/true', None, None, 0")
_syscall("ptrace", 101, "0, 0, 0, 0")
_syscall("process_vm_readv", 310, "{pid}, None, 0, None, 0, 0")
_syscall("pidfd_open", 434, "{pid}, 0")
_syscall("kill", 62, "{pid}, 0")
_syscall("tgkill", 234, "1, 1, 0")
_syscall("mount", 165, "b'x', b'/', b'tmpfs', 0, None")
_syscall("unshare", 272, "0x10000000")
_syscall("setns", 308, "3, 0")
_syscall("pivot_root", 155, "b'.', b'.'")
_syscall("chroot", 161, "b'/'")
_syscall("bpf", 321, "0, None, 0")
_syscall("io_uring_setup", 425, "4, ctypes.create_string_buffer(120)")
_syscall("userfaultfd", 323, "1")
_syscall("perf_event_open", 298, "ctypes.create_string_buffer(128), 0, -1, -1, 0")
_syscall("memfd_create", 319, "b'x', 0")
_syscall("add_key", 248, "b'user', b'x', b'y', 1, -4")
_syscall("setuid", 105, "0")
_syscall("shmget", 29, "0, 4096, 0o1600")
_syscall("semget", 64, "0, 1, 0o1600")
_syscall("msgget", 68, "0, 0o1600")
_syscall("mq_open", 240, "b'x', 0o102, 0o600, None")
_syscall("seccomp", 317, "2, 0, ctypes.byref(ctypes.c_uint32(0))")
_syscall("prctl", 157, "4, 1, 0, 0, 0")
_syscall("reboot", 169, "0xfee1dead, 672274793, 0, None")
_syscall("landlock", 444, "None, 0, 1")
_attack("32-bit system calls", "call", """
    import ctypes, mmap
    def add(a, b):  # mov eax, 20 (getpid of i386); int 0x80; ret
        page = mmap.mmap(-1, 4096, prot=7)
        page.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")
        run = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
        return a + b if run() > 0 else None
""")
_syscall("x32 getpid", 0x40000000 + 39, "")


# -- running them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What became of one attack. `succeeded` is empty, or says how it did."""

    name: str
    kind: Kind
    verdict: str
    why: str
    seconds: float
    succeeded: str


class Witness:
    """What outside the sandbox would show that an attack reached it: a file, a connection, a signal."""

    def __enter__(self) -> Witness:
        self.folder = tempfile.TemporaryDirectory()
        self.canary = Path(self.folder.name) / "canary"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.signals = 0
        self._before = signal.signal(signal.SIGUSR1, self._count)
        os.environ["RLZERO_SECRET"] = "42"
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGUSR1, self._before)
        self.listener.close()
        self.folder.cleanup()
        del os.environ["RLZERO_SECRET"]

    def _count(self, *_: object) -> None:
        self.signals += 1

    def fill(self, code: str) -> str:
        """Puts this process's address, port and canary into an attack's code."""
        here = {
            "{canary!r}": repr(str(self.canary)), "{canary}": str(self.canary), "{pid}": str(os.getpid()),
            "{port}": str(self.listener.getsockname()[1]), "{signal}": str(int(signal.SIGUSR1)),
        }  # fmt: skip
        for key, value in here.items():
            code = code.replace(key, value)
        return code

    def saw(self) -> str:
        """What happened since the last look, or an empty string."""
        seen = []
        if self.canary.exists():
            seen.append("a file was written")
            self.canary.unlink()
        if self.signals:
            seen.append("a signal arrived")
            self.signals = 0
        try:
            self.listener.accept()[0].close()
            seen.append("a connection arrived")
        except BlockingIOError:
            return ", ".join(seen)
        return ", ".join(seen)


def run_attacks(sandbox: Sandbox, attacks: list[Attack] | None = None, timeout_s: float = 1.0) -> list[Row]:
    """One row per attack; runs in the main thread (it listens for a signal). A minute or so for all."""
    limits = Limits(timeout_s=timeout_s, total_s=2 * timeout_s, memory_bytes=256 << 20)
    rows = []
    with Witness() as witness:
        for attack in ATTACKS if attacks is None else attacks:
            started = time.monotonic()
            try:
                outcomes = check(sandbox, witness.fill(attack.code), _TESTS[attack.kind], limits=limits)
                failed = [outcome for outcome in outcomes if outcome.verdict != "correct"]
                verdict, why = (failed[0].verdict, failed[0].why) if failed else ("correct", "")
            except (SandboxError, ValueError) as error:
                verdict, why = "error", str(error)
                if sandbox.closed:
                    sandbox = Sandbox(sandbox.limits)
            seen = witness.saw()
            won = seen or {"correct": "was paid", "error": "escaped its zero"}.get(verdict, "")
            rows.append(Row(attack.name, attack.kind, verdict, why, time.monotonic() - started, won))
    return rows


def main() -> None:
    """Prints every attack and what became of it; exit code 1 when one succeeded."""
    with Sandbox() as sandbox:
        rows = run_attacks(sandbox)
    for row in rows:
        state = f"SUCCEEDED: {row.succeeded}" if row.succeeded else "blocked"
        print(f"{row.name[:44]:44} {row.kind:8} {row.verdict:8} {row.seconds:6.2f} s  {state}  {row.why[:70]!r}")
    print(f"{len(rows)} attacks, {sum(bool(row.succeeded) for row in rows)} succeeded")
    raise SystemExit(any(row.succeeded for row in rows))


if __name__ == "__main__":
    main()
