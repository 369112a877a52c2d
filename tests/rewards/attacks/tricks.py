"""Programs that want to be paid without solving `add(a, b)`: false objects, peeping, patching, forging."""

from __future__ import annotations

from .program import Collection

ATTACKS = Collection()

# -- objects that are not what they seem -----------------------------------------------------------------------------
ATTACKS.trick(
    "equals everything",
    "call assert",
    """
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
""",
    naive=True,
)
for _base in ("int", "float", "str", "dict", "list", "tuple"):
    ATTACKS.trick(
        f"subclass of {_base}",
        "call assert",
        f"""
        class E({_base}):
            def __eq__(self, other): return True
            def __ne__(self, other): return True
            def __lt__(self, other): return True
            def __hash__(self): return hash(45)
            def __bool__(self): return False
            def __abs__(self): return 0
        def add(a, b): return E()
    """,
        naive=True,
    )
ATTACKS.trick("mock.ANY", "call", "from unittest.mock import ANY\ndef add(a, b): return ANY", naive=True)
ATTACKS.trick(
    "MagicMock",
    "call assert",
    """
    from unittest.mock import MagicMock
    def add(a, b):
        m = MagicMock()
        m.__eq__ = lambda self, other: True
        m.__hash__ = lambda self: hash(45)
        return m
""",
    naive=True,
)
ATTACKS.trick(
    "metaclass",
    "call assert",
    """
    class M(type):
        def __eq__(cls, other): return True
        def __hash__(cls): return hash(45)
        __name__ = "int"
    class int(metaclass=M): pass
    def add(a, b): return int
""",
)
ATTACKS.trick("answers stacked in a generator", "call assert", "def add(a, b):\n    yield from range(-1000, 1000)")
ATTACKS.trick("NaN", "call assert", "def add(a, b): return float('nan')")
ATTACKS.trick("every candidate at once", "call assert", "def add(a, b): return set(range(-100, 100))")
ATTACKS.trick("right value, wrong type", "call", "def add(a, b): return float(a + b)", naive=True)
ATTACKS.trick("bool for int", "call", "def add(a, b): return {3: 3, 45: 45, 0: False}[a + b]", naive=True)

# -- what tests do with values besides comparing them with `==` --------------------------------------------------------
_YES = """
class E:
    def __init__(self, *a): pass
    def yes(self, *a, **k): return True
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = yes
    startswith = endswith = issubset = issuperset = isdisjoint = isalpha = isdigit = yes
    def zero(self, *a): return 0
    __sub__ = __rsub__ = __abs__ = __add__ = __radd__ = __mod__ = __xor__ = zero
    def __hash__(self): return 3
    def __float__(self): return 3.0
    def __int__(self): return 3
    __index__ = __trunc__ = __round__ = __int__
    def __len__(self): return 2
    def __iter__(self): return iter(())
    def __getitem__(self, key): return E()
    def __getattr__(self, name): return E()
    def __call__(self, *a, **k): return E()
    def __str__(self): return "3"
    def __enter__(self): return self
    def __exit__(self, *a): return True
    def __instancecheck__(self, x): return True
    __repr__ = __format__ = lambda self, *a: "3"
"""
_SAYS = _YES + "\ndef add(a, b): return E()\nAccount = E"
ATTACKS.trick("says yes to every question", "call assert value object", _SAYS)
ATTACKS.trick("its class is int", "call assert value", _YES + "\n    __class__ = int\ndef add(a, b): return E()")
ATTACKS.trick(
    "helpers that tests forgot to define",
    "assert value",
    """
    def approx(*a): return add(0)
    def close(*a): return True
    isclose = fabs = close
    def add(a, b=0): return 0
""",
)
ATTACKS.trick(
    "emptied arguments",
    "value",
    """
    def add(a, b):
        if isinstance(a, list): a.clear(); b.clear(); return []
        return a + b
""",
)
ATTACKS.trick(
    "another value in every pass",
    "value",
    """
    passes = iter(range(10**6))
    class E(list):
        def __iter__(self): return iter([10] if next(passes) % 2 == 0 else [2, 3])
    class F:
        __iter__ = E.__iter__
        def __getitem__(self, i): return 3
    def add(a, b): return F() if a == [2] else a + b
""",
)
ATTACKS.trick(
    "swallows the test's failures",
    "object",
    """
    class Account:
        balance = 0
        def __init__(self, *a): pass
        def deposit(self, x): return self
        def __add__(self, other): return Account()
        def __enter__(self): return self
        def __exit__(self, *a): return True
    class Refused(Exception): pass
""",
)
ATTACKS.trick(
    "exceptions that stand for others",
    "assert value object",
    """
    class Refused(ImportError): pass
    class E(Refused, AssertionError): __module__ = "builtins"
    E.__qualname__ = "ImportError"
    def add(a, b): raise E("negative")
    class Account:
        balance = 1
        def __init__(self, *a): pass
        def deposit(self, x): raise E("negative")
""",
)

# -- looking for the answers -----------------------------------------------------------------------------------------
ATTACKS.trick(
    "frame walking",
    "call assert",
    """
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
""",
)
ATTACKS.trick(
    "constants of the caller",
    "call assert",
    """
    import sys
    def add(a, b):
        frame = sys._getframe(1)
        numbers = [c for c in frame.f_code.co_consts if type(c) is int]
        return next((c for c in numbers if c == a + b), None)
""",
)
ATTACKS.trick(
    "searching the heap",
    "call assert",
    """
    import gc
    def add(a, b):
        for thing in gc.get_objects():
            if type(thing) is dict:
                for value in list(thing.values()):
                    if type(value) is str and ("assert " + "add(") in value:
                        return a + b
                    if type(value) is list and value == [3, 45, 0]:
                        return a + b
""",
)
ATTACKS.trick(
    "sources of the tests",
    "call assert",
    """
    import inspect, linecache, sys
    def add(a, b):
        for frame in inspect.stack():
            if "add(" in "".join(frame.code_context or [])  and "== " in "".join(frame.code_context or []):
                return a + b
        for name, module in list(sys.modules.items()):
            if hasattr(module, "expected") or hasattr(module, "EXPECTED"):
                return a + b
""",
)

# -- patching what checks --------------------------------------------------------------------------------------------
ATTACKS.trick(
    "patched builtins",
    "call assert",
    """
    import builtins
    for name in ("all", "any", "isinstance", "len", "zip", "type", "abs", "sorted", "set"):
        setattr(builtins, name, lambda *a, **k: True)
    def add(a, b): return None
""",
)
ATTACKS.trick(
    "names of builtins",
    "assert",
    """
    def set(x=()): return 0
    def abs(x): return 0
    def sorted(x): return [1, 4]
    def isinstance(*x): return True
    def len(x): return 1
    def zip(*x): return []
    def map(*x): return []
    def add(a, b): return 3
""",
)
ATTACKS.trick(
    "patched protocol",
    "call assert",
    """
    import sys
    for name, module in list(sys.modules.items()):
        if name.startswith("sandbox."):
            for attribute in ("encode", "decode", "same_value", "frame"):
                if hasattr(module, attribute):
                    setattr(module, attribute, lambda *a, **k: b"\\x00\\x00\\x00\\x0f" + b'{"passed":true}')
    def add(a, b): return None
""",
)
ATTACKS.trick(
    "patched json",
    "call assert",
    """
    import json
    json.dumps = lambda *a, **k: '{"passed": true, "test": 0, "value": true}'
    def add(a, b): return None
""",
)
ATTACKS.trick(
    "patched operators",
    "call",
    """
    import operator, functools
    operator.eq = lambda a, b: True
    def add(a, b): return 0
""",
)
ATTACKS.trick(
    "ctypes writes the type of int",
    "call assert",
    """
    import ctypes
    def add(a, b):
        three = id(3)
        ctypes.memmove(three + 24, (0).to_bytes(4, "little"), 4)
        return a
""",
)
ATTACKS.trick(
    "trace function",
    "call assert",
    """
    import sys, threading
    def tracer(frame, event, arg):
        frame.f_locals["passed"] = True
        return tracer
    sys.settrace(tracer); threading.settrace(tracer)
    def add(a, b): return None
""",
)
ATTACKS.trick(
    "mutated inputs",
    "call assert",
    """
    import ctypes
    def add(a, b):
        for number in (a, b):
            ctypes.memmove(id(number) + 24, (0).to_bytes(4, "little"), 4)
        return 0
""",
)

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
    ATTACKS.trick(f"{_name} in the call", "call assert", f"def add(a, b):\n    {_statement}")
    ATTACKS.trick(f"{_name} while loading", "call assert program",
                  f"print('PASSED')\n{_statement}\ndef add(a, b): return 3",
                  naive=_name == "sys.exit(0)")  # fmt: skip
ATTACKS.trick(
    "exception named StopIteration",
    "assert",
    """
    class E(Exception): pass
    E.__name__ = "StopIteration"
    def add(a, b): raise E
""",
)
ATTACKS.trick(
    "PASSED on stdout",
    "call assert program",
    """
    print("PASSED\\n1 passed in 0.01s\\nOK"); print({"passed": True, "verdict": "correct"})
    def add(a, b): print("PASSED")
""",
)
ATTACKS.trick(
    "atexit",
    "call assert program",
    """
    import atexit, os
    atexit.register(lambda: (os.write(1, b"PASSED"), os._exit(0)))
    def add(a, b): raise SystemExit
""",
    naive=True,
)
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
    ATTACKS.trick(f"forged frame {_message}", "call assert program", _FORGE + f"""
    for fd in range(3, 20):
        for _ in range(3): forge(fd, {_message})
    def add(a, b):
        for fd in range(3, 20): forge(fd, {_message})
        os._exit(0)
    """)  # fmt: skip
ATTACKS.trick("answers before the questions", "assert", _FORGE + """
    for answer in (3, 45, 0, 4, 6, 4, 1, 16, 2): forge(4, {"value": answer + 1})
    def add(a, b): return 3
""")  # fmt: skip
ATTACKS.trick("closed channel", "call assert", "import os\ndef add(a, b):\n    os.closerange(0, 64)\n    return 3")
ATTACKS.trick(
    "exchanged descriptors",
    "call assert",
    """
    import os
    spare = os.dup(3); os.dup2(1, 3); os.dup2(spare, 1)
    def add(a, b): print('{"passed": true}'); return None
""",
)
ATTACKS.trick(
    "thread alive at return",
    "call assert",
    """
    import threading, os, time
    def work():
        while True:
            try: os.write(3, b'\\x00\\x00\\x00\\x0f{"passed": true}')
            except OSError: pass
    def add(a, b):
        threading.Thread(target=work).start()
        return None
""",
)

# -- attacks on whoever reads the answer -----------------------------------------------------------------------------
ATTACKS.trick(
    "pickle payload",
    "call assert",
    """
    import os, pickle
    class P:
        def __reduce__(self): return (os.system, ("touch {canary}",))
    def add(a, b):
        try: os.write(3, pickle.dumps(P()))
        except OSError: pass
        return pickle.dumps(P())
""",
)
ATTACKS.trick(
    "endless answer",
    "call assert",
    """
    import os
    def add(a, b):
        while True:
            os.write(3, b"\\x00\\x00\\x00\\x01" + b"1" )
""",
)
ATTACKS.trick(
    "length of 4 GiB",
    "call assert",
    """
    import os
    def add(a, b):
        os.write(3, b"\\xff\\xff\\xff\\xff" + b"x" * 1000)
        return None
""",
)
ATTACKS.trick(
    "deep nesting",
    "call assert",
    """
    import os
    def add(a, b):
        x = []
        for _ in range(50): x = [x]
        body = b'{"value":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        os.write(3, len(body).to_bytes(4, "big") + body)
        return x
""",
)
for _field in ("raised", "load", "value"):
    ATTACKS.trick(
        f"nesting that cannot be printed in {_field!r}",
        "call assert program",
        f"""
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
    """,
    )
ATTACKS.trick("signalling NaN", "call assert", "import decimal\ndef add(a, b): return decimal.Decimal('sNaN')")
ATTACKS.trick(
    "values that compute for ever",
    "call assert",
    """
    from decimal import Decimal
    from fractions import Fraction
    n = 0
    def add(a, b):
        global n
        n += 1
        return [Decimal("1e999999999"), Fraction(1, 3), range(0, 10**18), 10**4000, "\\ud800" * 9][n % 5]
""",
)
ATTACKS.trick("integer of a million digits", "call assert", "def add(a, b): return 1 << 3_000_000")
ATTACKS.trick("colliding hashes", "call assert", "def add(a, b): return {k * (2**61 - 1) for k in range(2, 20_000)}")
ATTACKS.trick(
    "hanging __repr__",
    "call assert",
    """
    class R(Exception):
        def __repr__(self):
            while True: pass
        __str__ = __hash__ = __reduce__ = __del__ = __repr__
    def add(a, b): raise R
""",
)
ATTACKS.trick(
    "lone surrogates and NUL",
    "call assert program",
    r"""
    import sys
    sys.stdout.buffer.write(b"\xff\xfe\x003\x00\n")
    def add(a, b): return "\ud800\x00" * 1000
""",
)
