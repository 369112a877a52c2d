"""The isolation layers of a job, one function each. A layer that cannot be built raises `IsolationError`: nothing runs.

`namespaces` and `empty_root` are called once, in the fork server; `around_job` in every fork (a user namespace of its
own without capabilities, rlimits, landlock, seccomp). No privilege is needed; root first becomes `nobody`.
"""

from __future__ import annotations

import errno
import math
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from . import syscalls

NOBODY = 65534
_STACK_BYTES = 128 << 20  # the gap the kernel always leaves under the main stack
_OPEN_FILES = 64


class IsolationError(Exception):
    """`name` says which layer could not be built, the message why and what to do."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"the {name} layer is missing: {why}")
        self.name = name
        self.why = why


@dataclass(frozen=True)
class Limits:
    """What one job may use. `timeout_s` is wall time a test, `total_s` wall time of all tests of one completion;
    `memory_bytes` is what the candidate may allocate beyond the interpreter; `output_bytes` caps what it says."""

    timeout_s: float = 6.0
    total_s: float = 30.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 4 << 20
    threads: int = 32

    def __post_init__(self) -> None:
        for name in ("timeout_s", "total_s", "memory_bytes", "output_bytes", "threads"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Limits.{name} is {getattr(self, name)!r}, expected a positive number")


@contextmanager
def _layer(name: str, advice: str = "") -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise IsolationError(name, f"{error}{'; ' + advice if advice else ''}") from error


_NAMESPACES = (
    ("user", "user", syscalls.CLONE_NEWUSER),
    ("mount", "mnt", syscalls.CLONE_NEWNS),
    ("network", "net", syscalls.CLONE_NEWNET),
    ("IPC", "ipc", syscalls.CLONE_NEWIPC),
)
_ADVICE = (
    "this kernel or container forbids unprivileged namespaces; allow them (user.max_user_namespaces, "
    "kernel.apparmor_restrict_unprivileged_userns, the container's seccomp profile) or use isolation='bubblewrap'"
)


def become_nobody() -> None:
    """As root: gives up root for good, so that limits count and no file of root's is in reach. Otherwise nothing."""
    if os.geteuid() != 0:
        return
    with _layer("user", "a root fork server must be able to become another user"):
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        syscalls.set_dumpable(True)  # without it /proc/self belongs to root and uid_map cannot be written


def namespaces() -> None:
    """User, mount, network and IPC namespaces for this process, a PID namespace for its children; each is checked."""
    uid, gid = os.geteuid(), os.getegid()
    for name, file, flag in _NAMESPACES:
        with _layer(name + " namespace", _ADVICE):
            before = os.stat(f"/proc/self/ns/{file}").st_ino
            syscalls.unshare(flag)
            if os.stat(f"/proc/self/ns/{file}").st_ino == before:
                raise OSError(f"unshare succeeded but /proc/self/ns/{file} is unchanged")
            if flag == syscalls.CLONE_NEWUSER:
                for path, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
                    with open(f"/proc/self/{path}", "w") as stream:
                        stream.write(text)
    with _layer("PID namespace", _ADVICE):
        syscalls.unshare(syscalls.CLONE_NEWPID)


def namespace_ids() -> dict[str, int]:
    """The namespaces of this process, by the name of their file under /proc."""
    return {file: os.stat(f"/proc/self/ns/{file}").st_ino for file in ("user", "mnt", "net", "ipc", "pid")}


def check_namespaces(outside: dict[str, int]) -> None:
    """Under bubblewrap: every namespace must differ from the owner's."""
    for file, number in namespace_ids().items():
        if number == outside[file]:
            raise IsolationError(f"{file} namespace", "bubblewrap left this process in its owner's")


def empty_root() -> None:
    """Replaces the file system by an empty, read-only one. Everything needed later must be imported and open."""
    with _layer("mount namespace", _ADVICE):
        flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("tmpfs", "/proc", "tmpfs", flags, "size=4k,nr_inodes=2,mode=755")
        syscalls.change_root("/proc")
        syscalls.mount(None, "/", None, syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY | flags)
        if os.listdir("/"):
            raise OSError(f"the new root holds {os.listdir('/')}, expected nothing")


def cpu_seconds(limits: Limits) -> int:
    """The CPU time after which the kernel kills a job: a second line behind the deadline on the clock."""
    return math.ceil(limits.total_s) + 1


# Nothing of these at all. The last three have no name in Python: MSGQUEUE, SIGPENDING, RTPRIO.
_FORBIDDEN = (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, 12, 11, 14)


def rlimits(limits: Limits, interpreter_bytes: int) -> None:
    """Soft = hard, so nothing can be raised again. A hard limit below what the job was promised raises
    `IsolationError`: the candidate would fail for our reasons."""
    memory = interpreter_bytes + limits.memory_bytes
    for name, kind, value in (
        ("AS", resource.RLIMIT_AS, memory),
        ("DATA", resource.RLIMIT_DATA, memory),
        ("CPU", resource.RLIMIT_CPU, cpu_seconds(limits)),
        ("NPROC", resource.RLIMIT_NPROC, limits.threads),
        ("NOFILE", resource.RLIMIT_NOFILE, _OPEN_FILES),
        ("STACK", resource.RLIMIT_STACK, _STACK_BYTES),
    ):
        try:
            resource.setrlimit(kind, (value, value))
        except ValueError as error:
            found = f"the job needs {value}, the hard limit is {resource.getrlimit(kind)[1]}; raise it (ulimit)"
            raise IsolationError(f"rlimit {name}", found) from error
    for kind in _FORBIDDEN:
        resource.setrlimit(kind, (0, 0))


def landlock_abi() -> int:
    """The kernel's landlock version; raises `IsolationError` where there is none."""
    with _layer("landlock", _LANDLOCK_ADVICE):
        return syscalls.landlock_abi()


_LANDLOCK_ADVICE = "needs Linux 5.13 with CONFIG_SECURITY_LANDLOCK and 'landlock' among the active LSMs"


def around_job(
    limits: Limits, interpreter_bytes: int, abi: int, seccomp: syscalls.Filter, own_user_namespace: bool
) -> None:
    """Everything a fork of the fork server puts up before it reads its first untrusted byte.

    Written without helpers that every job would pay for: a page that a fresh fork touches is a page to copy.
    """
    name, advice = "user namespace", _ADVICE
    try:
        if own_user_namespace:
            syscalls.unshare(syscalls.CLONE_NEWUSER)
        syscalls.set_dumpable(False)
        syscalls.drop_capabilities()
        name, advice = "rlimit", ""
        rlimits(limits, interpreter_bytes)
        name, advice = "landlock", _LANDLOCK_ADVICE
        syscalls.no_new_privileges()
        syscalls.landlock_deny_all(abi)
        name, advice = "seccomp", "needs a kernel with CONFIG_SECCOMP_FILTER"
        seccomp.install()
    except (OSError, ValueError) as error:
        raise IsolationError(name, f"{error}{'; ' + advice if advice else ''}") from error


def check_job(abi: int, pid_namespace: bool) -> None:
    """Called in the first isolated job: tries what must fail; `IsolationError` names the layer that let it through."""
    if pid_namespace and os.getpid() != 1:
        raise IsolationError("PID namespace", f"the job is process {os.getpid()}, expected 1")
    attempts = {
        "seccomp": [_fork, lambda: os.kill(os.getppid(), signal.SIGTERM), lambda: os.memfd_create("x")],
        "landlock": [lambda: os.open("/", os.O_RDONLY)],
    }
    for name, actions in attempts.items():
        for action in actions:
            try:
                action()
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EACCES):
                    continue
                raise IsolationError(name, f"expected a refusal, got {error}") from error
            raise IsolationError(name, "an action that must be refused succeeded")


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)
