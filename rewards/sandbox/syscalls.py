"""The Linux calls that Python's standard library lacks, through ctypes. Every function raises `OSError` on failure."""

from __future__ import annotations

import ctypes
import os
import struct
import sys

if sys.platform != "linux":
    raise ImportError(f"the code sandbox is made of Linux namespaces, landlock and seccomp; this is {sys.platform}")

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_GET_SECCOMP, _PR_SET_SECCOMP = 1, 4, 21, 22
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39
# The same numbers on every architecture (calls newer than the common table).
_CLOSE_RANGE, _LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 436, 444, 446
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
_capset, _capget = _libc.capset, _libc.capget  # looked up before the fork, not in every job


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Moves this process (its future children, for PID) into new namespaces."""
    _checked(_libc.unshare(flags), f"unshare({flags:#x})")


def setns(fd: int, kind: int) -> None:
    """Joins the namespace behind `fd`."""
    _checked(_libc.setns(fd, kind), "setns")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2)."""
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _checked(_libc.mount(encoded[0], encoded[1], encoded[2], flags, encoded[3]), f"mount({target})")


def change_root(folder: str) -> None:
    """Makes the mount point `folder` the root of this mount namespace and detaches the old root."""
    os.chdir(folder)
    number = _PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"pivot_root: unknown architecture {os.uname().machine!r}")
    _checked(_libc.syscall(number, b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")


def die_with_parent(signal_number: int) -> None:
    """The kernel sends `signal_number` to this process when the thread that forked it ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0), "prctl(PDEATHSIG)")


def set_dumpable(dumpable: bool) -> None:
    """Whether processes of the same user may look into this one through /proc and ptrace."""
    _checked(_libc.prctl(_PR_SET_DUMPABLE, int(dumpable), 0, 0, 0), "prctl(DUMPABLE)")


def no_new_privileges() -> None:
    """From here on exec gives no rights (set-user-ID bits are ignored); needed by landlock and seccomp."""
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(NO_NEW_PRIVS)")
    if _libc.prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1:
        raise OSError("prctl(NO_NEW_PRIVS) did not hold")


def close_from(fd: int) -> None:
    """Closes every descriptor from `fd` up."""
    _checked(_libc.syscall(_CLOSE_RANGE, fd, ctypes.c_uint(0xFFFFFFFF), 0), "close_range")


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


class Filter:
    """A seccomp filter made ready once, so that installing it in a fresh fork is a system call and little else."""

    def __init__(self, program: bytes) -> None:
        self._buffer = ctypes.create_string_buffer(program, len(program))  # of `struct sock_filter`, 8 bytes each
        self._fields = _Program(len(program) // 8, ctypes.cast(self._buffer, ctypes.c_void_p))
        self._address = ctypes.addressof(self._fields)

    def install(self) -> None:
        """For this thread and its children, for good."""
        _checked(_libc.prctl(_PR_SET_SECCOMP, 2, self._address, 0, 0), "prctl(SECCOMP)")
        if _libc.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) == 0:  # 2, or refused by the filter itself
            raise OSError("prctl(SECCOMP) did not hold")


def landlock_abi() -> int:
    """The kernel's landlock version (1, 2, ...)."""
    return _checked(_libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1), "landlock")


def landlock_deny_all(abi: int) -> None:
    """Denies every file access, TCP bind and connect, and (from ABI 6) signals and abstract sockets to the outside."""
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    network, scope = (3 if abi >= 4 else 0), (3 if abi >= 6 else 0)
    attributes = struct.pack("=QQQ", files, network, scope)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _checked(
        _libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0), "landlock_create"
    )
    try:
        _checked(_libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)


_CAPABILITY_HEADER = struct.pack("=Ii", 0x20080522, 0)  # version 3, this thread
_NO_CAPABILITIES = bytes(24)
_capabilities = ctypes.create_string_buffer(24)


def drop_capabilities() -> None:
    """Gives up every capability and checks it."""
    _checked(_capset(_CAPABILITY_HEADER, _NO_CAPABILITIES), "capset")
    _checked(_capget(_CAPABILITY_HEADER, _capabilities), "capget")
    if _capabilities.raw != _NO_CAPABILITIES:
        raise OSError("capset did not hold")
