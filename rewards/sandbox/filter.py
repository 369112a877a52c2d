"""The seccomp filter of a job: a short list of system calls that pure computation needs, everything else refused.

Built as classic BPF without a compiler or libseccomp. A refused call fails with `EPERM`, so a candidate sees an
ordinary `PermissionError`; another architecture's calling convention (32-bit or x32 on x86-64) kills the process.
Numbers: Linux `asm/unistd_64.h` and `asm-generic/unistd.h`.
"""

from __future__ import annotations

import errno
import platform
import struct

# name: (x86-64, aarch64); -1 = the architecture has no such call
ALLOWED: dict[str, tuple[int, int]] = {
    # bytes in and out of descriptors that are already open (nothing below can open a file)
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "dup": (32, 23),
    "dup2": (33, -1),
    "dup3": (292, 24),
    "fcntl": (72, 25),
    "pipe": (22, -1),
    "pipe2": (293, 59),
    "close_range": (436, 436),
    "getcwd": (79, 17),
    # waiting
    "poll": (7, -1),
    "ppoll": (271, 73),
    "select": (23, -1),
    "pselect6": (270, 72),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, -1),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "sched_yield": (24, 124),
    "pause": (34, -1),
    # the two ends of a stream pair, which asyncio wakes itself with (socketpair itself is among the conditions)
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "shutdown": (48, 210),
    # memory
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "madvise": (28, 233),
    # signals to itself and timers
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "alarm": (37, -1),
    # threads
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100),
    "rseq": (334, 293),
    "set_tid_address": (218, 96),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    # the clock, chance, and who am I
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, -1),
    "getrandom": (318, 278),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getpgrp": (111, -1),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getgroups": (115, 158),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "getpriority": (140, 141),
    "times": (100, 153),
    "sysinfo": (99, 179),
    "uname": (63, 160),
    # the end
    "exit": (60, 93),
    "exit_group": (231, 94),
}
CONDITIONAL: dict[str, tuple[int, int]] = {
    "clone": (56, 220), "clone3": (435, 435), "socketpair": (53, 199), "ioctl": (16, 29),
    "prlimit64": (302, 261),
}  # fmt: skip

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column in the tables, AUDIT_ARCH_*
_NR, _ARCH, _ARG0, _ARG1, _ARG2 = (
    0,
    4,
    16,
    24,
    32,
)  # offsets in struct seccomp_data; the low half of an argument comes first
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_PASS, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000

_CLONE_THREAD = 0x00010000
_CLONE_NEW_NAMESPACE = 0x7E020000  # every CLONE_NEW* flag of clone
_FIONBIO = 0x5421


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def column(machine: str) -> int:
    """Which column of `ALLOWED` describes `machine` (`platform.machine()`). Raises `OSError` for an unknown one."""
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOTSUP, f"no system-call table for {machine!r}; known: {', '.join(_ARCHITECTURES)}")
    return _ARCHITECTURES[machine][0]


def program(machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter` (8 bytes each) for `machine`, by default this one."""
    machine = machine or platform.machine()
    at = column(machine)
    deny = _instruction(_RETURN, _ERRNO | errno.EPERM)
    allow = _instruction(_RETURN, _PASS)

    def rule(name: str, body: list[bytes]) -> list[bytes]:
        return [_instruction(_JUMP_EQUAL, CONDITIONAL[name][at], 0, len(body)), *body]

    code = [
        _instruction(_LOAD, _ARCH),
        _instruction(_JUMP_EQUAL, _ARCHITECTURES[machine][1], 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NR),
    ]
    if machine == "x86_64":  # the x32 convention shares the architecture word and sets bit 30 of the number
        code += [_instruction(_JUMP_GREATER_EQUAL, 0x40000000, 0, 1), _instruction(_RETURN, _KILL)]
    # A thread may be made, a process or a namespace may not.
    code += rule("clone", [
        _instruction(_LOAD, _ARG0),
        _instruction(_JUMP_ANY_BIT, _CLONE_NEW_NAMESPACE, 2, 0),
        _instruction(_JUMP_ANY_BIT, _CLONE_THREAD, 0, 1),
        allow,
        deny,
    ])  # fmt: skip
    # clone3 hides its flags behind a pointer; "no such call" makes libc fall back to clone.
    code += rule("clone3", [_instruction(_RETURN, _ERRNO | errno.ENOSYS)])
    code += rule("socketpair", [
        _instruction(_LOAD, _ARG0),
        _instruction(_JUMP_EQUAL, 1, 0, 4),  # AF_UNIX
        _instruction(_LOAD, _ARG1),
        _instruction(_AND, 0xF),
        _instruction(_JUMP_EQUAL, 1, 0, 1),  # SOCK_STREAM
        allow,
        deny,
    ])  # fmt: skip
    code += rule("ioctl", [  # "not a terminal" is what isatty() wants to hear
        _instruction(_LOAD, _ARG1),
        _instruction(_JUMP_EQUAL, _FIONBIO, 0, 1),
        allow,
        _instruction(_RETURN, _ERRNO | errno.ENOTTY),
    ])  # fmt: skip
    # Jobs may read limits; setting one seems to work and does nothing. So programs that ask for a deeper stack go on
    # (theirs is deep already), and no job can lower its limits to be killed as if the machine were out of memory.
    code += rule("prlimit64", [
        _instruction(_LOAD, _ARG2),
        _instruction(_JUMP_EQUAL, 0, 0, 3),
        _instruction(_LOAD, _ARG2 + 4),
        _instruction(_JUMP_EQUAL, 0, 0, 1),
        allow,
        _instruction(_RETURN, _ERRNO),
    ])  # fmt: skip
    numbers = [number[at] for number in ALLOWED.values() if number[at] >= 0]
    for position, number in enumerate(numbers):
        code.append(_instruction(_JUMP_EQUAL, number, len(numbers) - position, 0))
    return b"".join([*code, deny, allow])
