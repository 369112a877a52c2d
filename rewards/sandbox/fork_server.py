"""The fork server: a warm, isolated interpreter that forks one child a job. Started by `sandbox.py`, never imported.

It reads requests from a control socket (JSON and descriptors) and never sees code, inputs or results. It ends when its
control socket closes or its owner dies; being process 1 of its PID namespace it takes every job with it.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import types
import warnings

# The package is loaded under a name of its own, so that the checkers (and what they import) stay out of this process.
_package = types.ModuleType("sandbox")
_package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
sys.modules["sandbox"] = _package
from sandbox import filter as syscall_filter  # noqa: E402
from sandbox import isolation, job, syscalls, tester, values  # noqa: E402

_NOT_PRELOADED = {
    "antigravity", "this", "idlelib", "tkinter", "turtle", "turtledemo", "test", "lib2to3", "ensurepip", "venv", "pip",
    "distutils", "curses", "readline", "rlcompleter", "webbrowser", "pydoc_data", "nis", "msilib", "crypt", "spwd",
    "ossaudiodev", "audioop", "sndhdr", "imghdr", "cgi", "cgitb", "nntplib", "telnetlib", "xdrlib", "uu", "pipes",
    "mailcap", "msvcrt", "winreg", "winsound", "asynchat", "asyncore", "smtpd", "imp", "dbm", "_tkinter", "pty", "tty",
    "__main__", "site", "sitecustomize", "usercustomize",
}  # fmt: skip
# Not the national code pages: a job's fork pays for every page and mapping that is loaded here.
_ENCODINGS = {
    "aliases", "ascii", "base64_codec", "bz2_codec", "charmap", "cp1252", "cp437", "hex_codec", "idna", "latin_1",
    "iso8859_1", "iso8859_15", "punycode", "quopri_codec", "raw_unicode_escape", "rot_13", "unicode_escape", "utf_16",
    "utf_16_be", "utf_16_le", "utf_32", "utf_32_be", "utf_32_le", "utf_7", "utf_8", "utf_8_sig", "zlib_codec",
}  # fmt: skip


def _preload(extra: list[str]) -> None:
    """Imports the standard library (what exists of it in this build) and `extra`, which must exist."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(sys.stdlib_module_names - _NOT_PRELOADED):
            if name.startswith("_") and name != "__future__":
                continue
            try:
                importlib.import_module(name)
            except ImportError:
                continue  # another platform's, or left out of this build of Python
        for package in ("collections", "concurrent.futures", "xml.etree", "json", "importlib", "encodings", "html"):
            for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
                if package != "encodings" or module.name in _ENCODINGS:
                    importlib.import_module(f"{package}.{module.name}")
        import asyncio.runners  # noqa: F401
        import unittest.mock  # noqa: F401
        import xml.dom.minidom  # noqa: F401

        for name in extra:
            importlib.import_module(name)
        for name in ("pytest",):  # tests of code may use its `approx` and `raises`
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)


class ForkServer:
    """Forks jobs and reports their ends."""

    def __init__(self, control: socket.socket, owner: int, config: dict) -> None:
        self.control = control
        self.owner = owner
        self.config = config
        self.pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY) if config["namespaces"] else None
        self.abi = isolation.landlock_abi()
        self.seccomp = syscalls.Filter(syscall_filter.program())
        with open("/proc/self/statm") as stream:
            self.interpreter_bytes = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        self.jobs: dict[int, tuple[int, int]] = {}  # pidfd: (pid, job)

    def say(self, message: dict) -> None:
        self.control.sendall(json.dumps(message).encode())

    def serve(self) -> None:
        """Until the control socket closes or the owner dies."""
        poller = select.poll()
        for fd in (self.control.fileno(), self.owner):
            poller.register(fd, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                if fd == self.owner:
                    return
                if fd == self.control.fileno():
                    data, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 8)
                    if not data:
                        return
                    self.take(json.loads(data), fds, poller)
                elif fd in self.jobs:
                    self.reap(fd, poller)

    def take(self, request: dict, fds: list[int], poller: select.poll) -> None:
        if "kill" in request:
            for pid, number in self.jobs.values():
                if number == request["kill"]:
                    _kill(pid)
            return
        try:
            pid = self.fork(request, fds)
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            self.say({"job": request["job"], "refused": f"cannot start a process: {error}"})
            return
        finally:
            for fd in fds:
                os.close(fd)
        self.jobs[pidfd] = (pid, request["job"])
        poller.register(pidfd, select.POLLIN)

    def fork(self, request: dict, fds: list[int]) -> int:
        """A child in a PID namespace of its own, as its process 1: killing it kills whatever it left behind."""
        if self.pid_namespace is not None:
            syscalls.unshare(syscalls.CLONE_NEWPID)
        try:
            pid = os.fork()
            if pid == 0:
                self.child(request, fds)  # never returns
        finally:
            if self.pid_namespace is not None:
                syscalls.setns(self.pid_namespace, syscalls.CLONE_NEWPID)
        return pid

    def reap(self, pidfd: int, poller: select.poll) -> None:
        pid, number = self.jobs.pop(pidfd)
        poller.unregister(pidfd)
        os.close(pidfd)
        _, status, usage = os.wait4(pid, 0)
        self.say({
            "job": number, "status": os.waitstatus_to_exitcode(status),
            "cpu_s": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss << 10,
        })  # fmt: skip

    def child(self, request: dict, fds: list[int]) -> None:
        """Never returns. Its first frame to the parent says whether it is isolated: no candidate has run yet."""
        code = 70
        try:
            os.setsid()
            for target, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, 16) for fd in fds]):
                os.dup2(fd, target)
            syscalls.close_from(len(fds))
            try:
                isolation.around_job(
                    isolation.Limits(**request["limits"]), self.interpreter_bytes, self.abi, self.seccomp,
                    self.pid_namespace is not None,
                )  # fmt: skip
                if request.get("probe"):
                    isolation.check_job(self.abi, self.pid_namespace is not None)
            except isolation.IsolationError as missing:
                values.write_frame(job.PARENT, {"missing": missing.name, "why": missing.why})
                os._exit(70)
            values.write_frame(job.PARENT, {"ready": True})
            if request.get("probe"):
                os._exit(0)
            task = values.read_frame(job.PARENT, job.MAX_REQUEST_BYTES)
            gc.enable()
            code = tester.run(task) if request["tester"] else job.run(task)
        except BaseException:  # noqa: BLE001 - the child of a fork must not run its parent's code
            code = 71
        finally:
            os._exit(code)


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def main() -> None:
    config = json.loads(sys.argv[1])
    control = socket.socket(fileno=config["control"])
    owner = config["owner"]
    _preload(config["preload"])
    sys.argv[:] = [""]
    sys.path[:] = []
    sys.path_importer_cache.clear()
    os.environ.clear()
    try:
        if config["namespaces"]:
            isolation.become_nobody()
            isolation.namespaces()
            pid = os.fork()
            if pid:
                control.close()
                os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
            syscalls.die_with_parent(signal.SIGKILL)
        else:
            isolation.check_namespaces(config["outside"])
        _offer_to_oom_killer()
        server = ForkServer(control, owner, config)
        if config["namespaces"]:
            isolation.empty_root()
    except isolation.IsolationError as missing:
        control.sendall(json.dumps({"missing": missing.name, "why": missing.why}).encode())
        os._exit(1)
    _warm_up()
    gc.collect()
    gc.disable()
    gc.freeze()
    server.say({"hello": server.abi})
    server.serve()
    os._exit(0)


def _warm_up() -> None:
    """Runs what every job runs, often enough for the interpreter to have specialised it: a fork pays for each page that
    it changes."""
    for _ in range(20):
        scope: dict = {}
        exec(compile("def f(x):\n    return [x, str(x)]\n", "<warm up>", "exec", dont_inherit=True), scope)
        for value in (((1,), {}), [1, "a", (2.5, None)], {"a": {1}}):
            message = values.loads(values.frame({"value": values.encode(value)})[4:])
            scope["f"](values.decode(message["value"]))


def _offer_to_oom_killer() -> None:
    """When the machine runs out of memory, a candidate goes before a trainer."""
    with open("/proc/self/oom_score_adj", "w") as stream:
        stream.write("1000")


if __name__ == "__main__":
    main()
