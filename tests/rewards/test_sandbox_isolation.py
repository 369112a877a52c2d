"""Each isolation layer holds alone; one that cannot be built stops the sandbox with its name, and nothing runs."""

import ctypes
import errno
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rewards.sandbox import Limits, Sandbox, SandboxError, isolation, syscalls
from rewards.sandbox import filter as syscall_filter

ROOT = Path(__file__).parents[2]


def in_child(action) -> str:
    """What `action` returns (as text) in a forked child, which is then gone."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = str(action())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode()[:4000])
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        said = stream.read().decode()
    os.waitpid(pid, 0)
    return said


def refused(action) -> str:
    """ "refused" when `action` raises PermissionError, else what happened."""
    try:
        return f"went through: {action()}"
    except PermissionError:
        return "refused"


def under_landlock(action):
    def run():
        syscalls.no_new_privileges()
        syscalls.landlock_deny_all(isolation.landlock_abi())
        return refused(action)

    return in_child(run)


def under_seccomp(action):
    def run():
        syscalls.no_new_privileges()
        syscalls.Filter(syscall_filter.program()).install()
        return action()

    return in_child(run)


def under_namespaces(action):
    def run():
        isolation.become_nobody()
        isolation.namespaces()
        return action()

    return in_child(run)


@pytest.mark.parametrize(
    "action",
    [
        lambda: os.open("/etc/passwd", os.O_RDONLY),
        lambda: os.listdir("/"),
        lambda: os.mkdir("/tmp/rlzero_landlock"),
        lambda: os.execv("/bin/true", ["true"]),
        lambda: socket.create_server(("127.0.0.1", 0)),
        lambda: os.kill(os.getppid(), 0),
    ],
    ids=["read", "list", "mkdir", "execute", "bind", "signal"],
)
def test_landlock_alone_refuses(action):
    assert under_landlock(action) == "refused"


@pytest.mark.parametrize(
    "action",
    [
        os.fork,
        lambda: os.open("/", 0),
        socket.socket,
        lambda: os.kill(os.getppid(), 0),
        os.setsid,
        lambda: os.memfd_create("x"),
        lambda: os.execv("/bin/true", ["true"]),
        lambda: os.mkdir("/tmp/x"),
        lambda: os.chdir("/"),
        lambda: os.unlink("/tmp/x"),
        lambda: syscalls.unshare(syscalls.CLONE_NEWUSER),
        lambda: os.pidfd_open(os.getpid()),
        lambda: os.setuid(0),
    ],
)
def test_seccomp_alone_refuses(action):
    assert under_seccomp(lambda: refused(action)) == "refused"


def test_seccomp_lets_computation_pass():
    def compute():
        import asyncio
        import threading
        import time

        results = []
        thread = threading.Thread(target=lambda: results.append(asyncio.run(asyncio.sleep(0, 5))))
        thread.start()
        thread.join()
        time.sleep(0.001)
        return results + [len(os.urandom(4)), len(bytearray(10 << 20)) >> 20]

    assert under_seccomp(compute) == "[5, 4, 10]"


def test_setting_limits_seems_to_work_and_does_nothing():
    def attempt():
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, 1))
        return resource.getrlimit(resource.RLIMIT_NOFILE) == before

    assert under_seccomp(attempt) == "True"


def test_the_network_namespace_alone_has_no_way_out():
    def connect():
        with socket.socket() as line:
            line.settimeout(1)
            return line.connect_ex(("127.0.0.1", port))

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert in_child(connect) == "0"
        assert under_namespaces(connect) == str(errno.ENETUNREACH)


def test_the_mount_namespace_alone_is_empty_and_read_only():
    def look():
        isolation.empty_root()
        try:
            os.mkdir("/x")
        except OSError as error:
            return os.listdir("/"), errno.errorcode[error.errno]

    assert under_namespaces(look) == "([], 'EROFS')"


def test_the_pid_namespace_alone_hides_every_other_process():
    def look():
        pid = os.fork()
        if pid == 0:
            try:
                os.kill(outside, 0)
            except ProcessLookupError:
                os._exit(os.getpid())
            os._exit(99)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    outside = os.getpid()
    assert under_namespaces(look) == "1"


def test_root_is_given_up_for_good():
    def look():
        isolation.become_nobody()
        return os.getresuid(), refused(lambda: os.setuid(0)), os.getgroups()

    if os.geteuid() != 0:
        assert in_child(lambda: isolation.become_nobody() or os.geteuid()) == str(os.geteuid())
    else:
        assert in_child(look) == "((65534, 65534, 65534), 'refused', [])"


# -- a missing layer -------------------------------------------------------------------------------------------------

_NUMBERS = {"unshare": (272, 97), "landlock": (444, 444), "prctl": (157, 167), "setresuid": (117, 147)}
_FLAGS = {
    "user": syscalls.CLONE_NEWUSER,
    "mount": syscalls.CLONE_NEWNS,
    "network": syscalls.CLONE_NEWNET,
    "IPC": syscalls.CLONE_NEWIPC,
    "PID": syscalls.CLONE_NEWPID,
}


def deny(call: str, argument: int | None = None, error: int = errno.EPERM) -> None:
    """Makes the kernel refuse a call (with this first argument) to this process and its children: a real machine that
    lacks something."""
    number = _NUMBERS[call][syscall_filter.column(platform.machine())]
    checks = [] if argument is None else [(0x20, 0, 0, 16), (0x15, 0, 1, argument)]
    program = [
        (0x20, 0, 0, 0),
        (0x15, 0, len(checks) + 1, number),
        *checks,
        (0x06, 0, 0, 0x00050000 | error),
        (0x06, 0, 0, 0x7FFF0000),
    ]
    syscalls.Filter(b"".join(syscall_filter._instruction(c, k, t, f) for c, t, f, k in program)).install()


def start_without(action) -> str:
    """What starting a sandbox says after `action` took something away."""

    def attempt():
        action()
        with Sandbox() as sandbox:
            return f"started and ran: {sandbox.call('def f(): return 1', 'f', [((), {})])}"

    return in_child(attempt)


@pytest.mark.parametrize("name, flag", _FLAGS.items())
def test_a_missing_namespace_is_named(name, flag):
    said = start_without(lambda: deny("unshare", flag))
    assert said.startswith(f"SandboxError: the {name} namespace layer is missing") and "bubblewrap" in said


def test_a_kernel_without_landlock_is_named():
    said = start_without(lambda: deny("landlock", error=errno.ENOSYS))
    assert said.startswith("SandboxError: the landlock layer is missing") and "CONFIG_SECURITY_LANDLOCK" in said


def test_a_kernel_without_seccomp_is_named():
    said = start_without(lambda: deny("prctl", 22, errno.EINVAL))
    # the filter above is itself seccomp, so this process keeps it: only the sandbox's own cannot be installed
    assert said.startswith("SandboxError: the seccomp layer is missing")


@pytest.mark.skipif(os.geteuid() != 0, reason="only a root fork server changes its user")
def test_a_root_that_cannot_give_itself_up_is_named():
    assert start_without(lambda: deny("setresuid")).startswith("SandboxError: the user layer is missing")


def limit(name: str, value: int):
    return lambda: resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("AS", 400 << 20, "the rlimit AS layer is missing: the job needs"),
        ("STACK", 16 << 20, "the rlimit STACK layer is missing"),
        ("CPU", 20, "the rlimit CPU layer is missing"),
        ("NOFILE", 48, "the rlimit NOFILE layer is missing"),
        ("NOFILE", 3, "cannot start the sandbox: [Errno 24] Too many open files"),
        ("NPROC", 16, "the rlimit NPROC layer is missing"),
        ("NPROC", 1, "Resource temporarily unavailable"),
    ],
)
def test_under_ulimit_pressure_it_says_so_instead_of_scoring(name, value, expected):
    assert expected in start_without(limit(name, value))


def test_too_little_memory_to_start_is_an_error_of_ours():
    said = start_without(limit("AS", 120 << 20))
    assert said.startswith("SandboxError: "), said


def test_bubblewrap_without_the_program_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SandboxError, match="bubblewrap layer is missing: no 'bwrap'"):
        Sandbox(isolation="bubblewrap")


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no 'bwrap' program: install bubblewrap to test this way")
def test_bubblewrap_holds_the_same_jobs():
    with Sandbox(isolation="bubblewrap") as sandbox:
        code = "import os\ndef f(x):\n    try: return os.listdir('/')\n    except PermissionError: return x"
        assert sandbox.call(code, "f", [((5,), {})]).frames == [{"value": 5}]
        assert (
            sandbox.call("def f(x):\n    while True: pass", "f", [((5,), {})], limits=Limits(timeout_s=0.3)).end
            == "timeout"
        )


def test_a_bubblewrap_that_isolates_nothing_is_named(tmp_path, monkeypatch):
    fake = tmp_path / "bwrap"
    fake.write_text('#!/bin/sh\nwhile [ "$1" != "--" ]; do shift; done\nshift\nexec "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SandboxError, match="the user namespace layer is missing: bubblewrap left this process"):
        Sandbox(isolation="bubblewrap")


def test_unknown_isolation_and_limits_are_refused():
    with pytest.raises(ValueError, match="expected 'namespaces' or 'bubblewrap'"):
        Sandbox(isolation="chroot")
    with pytest.raises(ValueError, match="timeout_s is 0"):
        Limits(timeout_s=0)


# -- who runs it -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests already run without privilege")
def test_it_runs_without_any_privilege():
    """As nobody, without capabilities, from an interpreter that nobody may read."""
    program = f"""
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        from rewards.sandbox import syscalls
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount({sys.base_prefix!r}, "/mnt", None, syscalls.MS_BIND | syscalls.MS_REC)
        os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
        os.execv("/mnt/bin/python3", ["python3", "-B", "-c", '''if True:
            import os, sys
            sys.path.insert(0, {str(ROOT)!r})
            from rewards.sandbox import Sandbox
            with Sandbox() as sandbox:
                run = sandbox.call("def f(x): return x + 1", "f", [((1,), {{}})])
            print(os.getuid(), run.frames)
        '''])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "65534 [{'value': 2}]", done.stderr


# -- the table of system calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers, at",
    [(("/usr/include/x86_64-linux-gnu/asm/unistd_64.h",), 0), (("/usr/include/asm-generic/unistd.h",), 1)],
    ids=["x86_64", "aarch64"],
)
def test_system_call_numbers_are_the_kernels(headers, at):
    header = Path(headers[0])
    if not header.exists():
        pytest.skip(f"no {header}: install the kernel's headers")
    known = {}
    for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()):
        known[name] = int(number)
    known.setdefault("newfstatat", known.get("fstatat"))
    for name, numbers in {**syscall_filter.ALLOWED, **syscall_filter.CONDITIONAL}.items():
        assert numbers[at] == known.get(name, -1), name


def test_the_filter_knows_both_architectures_and_no_other():
    assert len(syscall_filter.program("x86_64")) % 8 == 0 and len(syscall_filter.program("aarch64")) % 8 == 0
    with pytest.raises(OSError, match="no system-call table for 'riscv64'"):
        syscall_filter.program("riscv64")
    assert ctypes.sizeof(syscalls._Program) == 16
