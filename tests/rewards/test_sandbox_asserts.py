"""Assertions of data sets: what right programs may do in them, what wrong ones get nowhere with, what is refused.

Every case is the candidate's code and one test.
"""

import pytest

from rewards.code import AssertTests, CallTests, check
from rewards.sandbox import Limits, Sandbox

VECTOR = """
class Vector:
    def __init__(self, x, y): self.x, self.y = x, y
    def __add__(self, o): return Vector(self.x + o.x, self.y + o.y)
    def __mul__(self, k): return Vector(self.x * k, self.y * k)
    def __rmul__(self, k): return self * k
    def __neg__(self): return Vector(-self.x, -self.y)
    def __abs__(self): return (self.x ** 2 + self.y ** 2) ** 0.5
    def __eq__(self, o): return isinstance(o, Vector) and (self.x, self.y) == (o.x, o.y)
    def __lt__(self, o): return abs(self) < abs(o)
    def __str__(self): return f"({self.x}, {self.y})"
    def scale(self, k): return self * k
    def __iadd__(self, o): self.x += o.x; self.y += o.y; return self
"""

RIGHT = {
    "inplace sort": (
        "def sort(x): x.sort()",
        """
xs=[3,1,2]
sort(xs)
assert xs==[1,2,3]
""",
    ),
    "inplace grid": (
        "def rotate(g): g[:] = [list(r) for r in zip(*g[::-1])]",
        """
g=[[1,2],[3,4]]
rotate(g)
assert g==[[3,1],[4,2]]
""",
    ),
    "inplace row kept": (
        """
def z(g):
  for r in g: r[0]=0
""",
        """
g=[[1,2],[3,4]]
r=g[0]
z(g)
assert r==[0,2]
""",
    ),
    "inplace k": (
        """
def dedupe(n):
  n[:]=sorted(set(n)); return len(n)
""",
        """
nums=[1,1,2]
k=dedupe(nums)
assert k==2 and nums[:k]==[1,2]
""",
    ),
    "inplace none": (
        "def sort(x): x.sort()",
        """
xs=[3,1]
assert sort(xs) is None
assert xs==[1,3]
""",
    ),
    "inplace dict": (
        """
def inc(d):
  for k in d: d[k]+=1
""",
        """
d={'a':1}
inc(d)
assert d=={'a':2}
""",
    ),
    "operators": (
        VECTOR,
        """
v=Vector(1,2)+Vector(3,4)
assert v.x==4 and v.y==6 and abs(Vector(3,4))==5.0 and Vector(1,1)<Vector(2,2)
assert (2*v).x==8 and (-v).x==-4 and str(v)=='(4, 6)'
""",
    ),
    "iadd": (
        VECTOR,
        """
v=Vector(1,2)
v+=Vector(1,1)
assert v.x==2
""",
    ),
    "with": (
        """
class T:
  def __enter__(self): self.on=True; return self
  def __exit__(self,*a): self.on=False
""",
        """
with T() as t:
    assert t.on
assert not t.on
""",
    ),
    "with cm": (
        """
from contextlib import contextmanager
log=[]
@contextmanager
def tag(n):
  log.append(n); yield n.upper(); log.append('end')
def get(): return log
""",
        """
with tag('a') as x:
    assert x=='A'
assert get()==['a','end']
""",
    ),
    "isinstance": (
        """
class Node:
  def __init__(self,v): self.v=v
def make(v): return Node(v)
""",
        "assert isinstance(make(1), Node) and make(1).v==1",
    ),
    "isinstance tuple": (
        """
class Node: pass
def make(v): return Node()
""",
        "assert isinstance(make(1), (int, Node))",
    ),
    "own exc": (
        """
class Empty(Exception): pass
class Stack:
  def pop(self): raise Empty('nothing')
""",
        """
s=Stack()
try:
    s.pop()
    assert False
except Empty as e:
    assert str(e)=='nothing'
""",
    ),
    "own exc sub": (
        """
class NegErr(ValueError):
  def __init__(self,c): super().__init__(f'neg {c}'); self.code=c
def f(x): raise NegErr(x)
""",
        """
try:
    f(-1)
    assert False
except ValueError as e:
    assert e.code==-1 and 'neg' in str(e)
""",
    ),
    "own exc raises": (
        """
class NegErr(ValueError): pass
def f(x): raise NegErr('bad')
""",
        """
import pytest
with pytest.raises(NegErr, match='bad'):
    f(1)
""",
    ),
    "pytest raises": (
        "def f(x): raise ValueError('bad')",
        """
import pytest
with pytest.raises(ValueError) as e:
    f(1)
assert 'bad' in str(e.value)
""",
    ),
    "pytest no import": (
        "def f(x): raise ValueError('bad')",
        """
with pytest.raises(ValueError):
    f(1)
assert True
""",
    ),
    "approx": (
        "def f(x): return x/3",
        """
from pytest import approx
assert f(1)==approx(0.3333333)
""",
    ),
    "keyerror": (
        "def f(d): return d['x']",
        """
try:
    f({})
    assert False
except KeyError as e:
    assert e.args==('x',) and str(e)=="'x'"
""",
    ),
    "jsonerr": (
        """
import json
def f(s): return json.loads(s)
""",
        """
import json
try:
    f('{')
    assert False
except json.JSONDecodeError: pass
""",
    ),
    "assertionerr": (
        "def f(x): assert x>0",
        """
try:
    f(-1)
except AssertionError: ok=True
assert ok
""",
    ),
    "in gen": (
        "def f(): yield 5",
        "assert 5 in f()",
    ),
    "in object": (
        """
class Interval:
  def __init__(s,a,b): s.a,s.b=a,b
  def __contains__(s,v): return s.a<=v<=s.b
  def width(s): return s.b-s.a
""",
        """
i=Interval(1,5)
assert 3 in i and 9 not in i and i.width()==4
""",
    ),
    "isclose helper": (
        """
from math import *
def f(x): return 2.5
""",
        "assert isclose(f(1), 2.5)",
    ),
    "Counter": (
        "def f(x): return list(x)",
        "assert Counter(f('aab'))==Counter({'a':2,'b':1})",
    ),
    "namedtuple": (
        """
from collections import namedtuple
P=namedtuple('P','x y')
def f(): return P(1,2)
""",
        """
p=f()
assert p.x==1 and p==(1,2) and p[1]==2 and isinstance(p,tuple)
""",
    ),
    "namedtuple ctor": (
        """
from collections import namedtuple
Point=namedtuple('Point','x y')
""",
        """
p=Point(1,2)
assert p.x==1 and p==(1,2) and Point(1,2)==Point(1,2)
""",
    ),
    "dict subclass": (
        """
class CI(dict):
  def __getitem__(s,k): return super().__getitem__(k.lower())
  def __setitem__(s,k,v): super().__setitem__(k.lower(),v)
  def lower_keys(s): return list(s)
""",
        """
d=CI()
d['A']=1
assert d['a']==1 and d=={'a':1} and d.lower_keys()==['a']
""",
    ),
    "dict views": (
        "def f(d): return d.keys()",
        "assert len(f({'a':1}))==1 and f({'a':1})=={'a'} and sorted(f({'b':1}))==['b']",
    ),
    "next": (
        """
def gen():
  a=0
  while True:
    yield a; a+=1
""",
        """
g=gen()
assert next(g)==0 and next(g)==1
from itertools import islice
assert list(islice(g,2))==[2,3]
""",
    ),
    "next end": (
        """
def gen():
  yield 1
""",
        """
g=gen()
assert next(g)==1
try:
    next(g)
    assert False
except StopIteration: pass
""",
    ),
    "items attack": (
        """
import itertools
class P:
  c=itertools.count()
  def __len__(s): return 3
  def __getitem__(s,i): return next(P.c)
def f(n): return P()
""",
        """
p=f(3)
assert p[0]==p[0] and p[0]!=p[1]
""",
    ),
    "async": (
        """
import asyncio
async def f(x):
  await asyncio.sleep(0)
  return x+1
""",
        """
import asyncio
assert asyncio.run(f(1))==2
""",
    ),
    "async2": (
        """
import asyncio
async def f(x):
  await asyncio.sleep(0)
  return x+1
""",
        """
import asyncio
async def main():
    r=await asyncio.gather(f(1),f(2))
    assert r==[2,3]
asyncio.run(main())
""",
    ),
    "enum": (
        """
import enum
class Color(enum.Enum):
  RED=1
def f(): return Color.RED
""",
        "assert Color.RED.value==1 and f()==Color.RED and f() is not None",
    ),
    "closure": (
        "def adder(n): return lambda x: x+n",
        "assert adder(2)(3)==5",
    ),
    "linked": (
        """
class Node:
  def __init__(s,v,n=None): s.val,s.next=v,n
def rev(h):
  p=None
  while h: h.next,p,h=p,h,h.next
  return p
""",
        """
h=Node(1,Node(2))
r=rev(h)
assert r.val==2 and r.next.val==1 and r.next.next is None
""",
    ),
    "repr": (
        """
class P:
  def __init__(s,x): s.x=x
  def __repr__(s): return f'P({s.x})'
""",
        "assert repr(P(1))=='P(1)' and P(1).x==1",
    ),
    "sorted objs": (
        VECTOR,
        """
vs=sorted([Vector(3,3),Vector(1,1)])
assert vs[0].x==1
""",
    ),
    "unittest": (
        "def f(x): return x+1",
        """
import unittest
class T(unittest.TestCase):
    def test(self):
        self.assertEqual(f(1),2)
r=unittest.TestResult()
unittest.defaultTestLoader.loadTestsFromTestCase(T).run(r)
assert r.wasSuccessful()
""",
    ),
    "2 for 2.0": (
        "def f(x): return 2",
        "assert f(1)==2.0",
    ),
    "check form": (
        "def f(xs): xs.sort()",
        """
def check(candidate):
    xs=[2,1]
    candidate(xs)
    assert xs==[1,2]
check(f)
""",
        ("f",),
    ),
    "check objs": (
        """
class S:
  def __init__(s): s.i=[]
  def push(s,x): s.i.append(x)
  def __len__(s): return len(s.i)
  def __add__(s,o): return len(s.i)+len(o.i)
""",
        """
def check(candidate):
    a=candidate(); a.push(1)
    b=candidate(); b.push(2)
    assert a+b==2 and len(a)==1
check(S)
""",
        ("S",),
    ),
    "len attack": (
        """
class C:
  def __len__(s): return 5
  def __iter__(s): return iter(())
def f(n): return C()
""",
        """
r=f(5)
assert len(r)==5
assert all(x>0 for x in r)
""",
    ),
}

UNITTEST = """
import unittest
class T(unittest.TestCase):
    def test(self):
        self.assertEqual(f(1), 2)
r = unittest.TestResult()
unittest.defaultTestLoader.loadTestsFromTestCase(T).run(r)
assert r.wasSuccessful()
"""

WRONG = {
    "skips a unittest": ("import unittest\ndef f(x): raise unittest.SkipTest('x')", UNITTEST),
    "stops a unittest": ("import unittest.case\ndef f(x): raise unittest.case._ShouldStop()", UNITTEST),
    "changed where the result points to": (
        "def find(x, v): x[0] = v; return 0",
        "xs = [1, 2, 3]\ni = find(xs, 3)\nassert xs[i] == 3",
    ),
    "changed until the property holds": (
        "def two(x, t): x[:2] = [t, 0]; return 0, 1",
        "xs = [1, 2, 3]\ni, j = two(xs, 5)\nassert xs[i] + xs[j] == 5",
    ),
    "changed until the sum is right": (
        "def best(x): x[:] = [6]; return 0, 1",
        "xs = [1, 2, 3]\na, b = best(xs)\nassert sum(xs[a:b]) == 6",
    ),
    "clear attack": (
        "def f(x): x.clear(); return []",
        """
xs=[3,1,2]
assert f(xs)==sorted(xs)
""",
    ),
    "clear attack 2": (
        "def f(x): x.clear(); return []",
        """
xs=[3,1,2]
r=f(xs)
e=sorted(xs)
assert r==e
""",
    ),
    "clear attack 3": (
        "def f(x): x.clear(); return []",
        """
for xs in [[3,1,2],[5,4]]:
    out=f(xs)
    assert len(out)==len(xs) and all(a in xs for a in out)
""",
    ),
    "clear in helper": (
        "def f(x): x.clear(); return []",
        """
def chk(xs):
    assert f(xs)==sorted(xs)
chk([2,1])
""",
    ),
    "sum attack": (
        """
def f(x):
  s=0; x.clear(); return 0
""",
        """
xs=[3,1,2]
assert f(xs)==sum(xs)
""",
    ),
    "eq always": (
        VECTOR.replace("return isinstance(o, Vector) and (self.x, self.y) == (o.x, o.y)", "return True"),
        "assert Vector(1,2)+Vector(3,4)==Vector(4,6)",
    ),
    "with swallow": (
        """
class T:
  def __enter__(self): return self
  def __exit__(self,*a): return True
  def v(self): return 1
""",
        """
with T() as t:
    assert t.v()==2
""",
    ),
    "with swallow2": (
        """
class T:
  def __enter__(self): return self
  def __exit__(self,*a): return True
  def v(self): raise ValueError
""",
        """
with T() as t:
    assert t.v()==2
""",
    ),
    "with swallow3": (
        """
class T:
  def __enter__(self): return self
  def __exit__(self,*a): return True
  def v(self): return self
""",
        """
with T() as t:
    assert t.v()<2
""",
    ),
    "isinstance no": (
        """
class Node: pass
def make(v): return 5
""",
        "assert isinstance(make(1), Node)",
    ),
    "raises not": (
        "def f(x): return 1",
        """
import pytest
with pytest.raises(ValueError):
    f(1)
""",
    ),
    "approx attack": (
        """
class E(float):
  def __eq__(s,o): return True
  def __sub__(s,o): return 0.0
  def __rsub__(s,o): return 0.0
  def __abs__(s): return 0.0
def f(x): return E(9)
""",
        """
from pytest import approx
assert f(1)==approx(0.3333333)
""",
    ),
    "approx attack2": (
        """
class E:
  def __eq__(s,o): return True
  def __sub__(s,o): return 0.0
  def __rsub__(s,o): return 0.0
  def __abs__(s): return 0.0
  def __float__(s): return 1/3
def f(x): return E()
""",
        """
from pytest import approx
assert approx(0.3333333)==f(1)
""",
    ),
    "import attack": (
        "def f(x): raise ImportError('x')",
        "assert f(1)==2",
    ),
    "in attack": (
        """
class C:
  def __contains__(s,v): return True
  def __iter__(s): return iter(())
def f(): return C()
""",
        "assert 5 in f()",
    ),
    "in attack2": (
        """
class C:
  def __contains__(s,v): return True
def f(): return C()
""",
        "assert 5 in f()",
    ),
    "issubset attack": (
        """
class C:
  def issubset(s,o): return True
def f(): return C()
""",
        "assert f().issubset({1})",
    ),
    "startswith attack": (
        """
class C:
  def startswith(s,o): return True
def f(): return C()
""",
        "assert f().startswith('x')",
    ),
    "sub attack": (
        """
class C:
  def __sub__(s,o): return 0
  def __rsub__(s,o): return 0
def f(x): return C()
""",
        "assert abs(f(1)-3)<1e-6",
    ),
    "isclose attack": (
        """
def isclose(a,b): return True
def f(x): return 0
""",
        "assert isclose(f(1), 2.5)",
    ),
    "shadow sorted": (
        """
def sorted(x): return [1,2]
def f(x): return [9]
""",
        "assert sorted(f(1))==[1,2]",
    ),
    "two passes attack": (
        """
class P:
  n=0
  def __iter__(s):
    P.n+=1
    return iter([10]) if P.n==1 else iter([2])
def f(n): return P()
""",
        """
p=f(10)
assert sum(p)==10
assert all(x in (2,3,5,7) for x in p)
""",
    ),
    "unittest attack": (
        """
class E:
  def __eq__(s,o): return True
def f(x): return E()
""",
        """
import unittest
class T(unittest.TestCase):
    def test(self):
        self.assertEqual(f(1),2)
r=unittest.TestResult()
unittest.defaultTestLoader.loadTestsFromTestCase(T).run(r)
assert r.wasSuccessful()
""",
    ),
    "bool hash float idx": (
        """
class C:
  def __bool__(s): return True
  def __hash__(s): return 3
  def __float__(s): return 3.0
  def __index__(s): return 3
  def __int__(s): return 3
  def __eq__(s,o): return True
def f(n): return C()
""",
        """
import math
assert math.isclose(f(1),3.0)
""",
    ),
    "index": (
        """
class C:
  def __index__(s): return 3
def f(n): return C()
""",
        "assert [0,1,2,3][f(1)]==3",
    ),
    "getattr class": (
        """
class C:
  def __getattribute__(s,n): return int if n=='__class__' else object.__getattribute__(s,n)
def f(n): return C()
""",
        "assert isinstance(f(1),int)",
    ),
    "str attack": (
        """
class C:
  def __str__(s): return '3'
def f(n): return C()
""",
        "assert f(1)==3",
    ),
    "tuple of evil": (
        """
class E:
  def __eq__(s,o): return True
def f(n): return [E(),E()]
""",
        "assert f(1)==[1,2]",
    ),
    "dict of evil": (
        """
class E:
  def __eq__(s,o): return True
def f(n): return {'a':E()}
""",
        "assert f(1)['a']==1",
    ),
    "evil max": (
        """
class E:
  def __eq__(s,o): return True
  def __gt__(s,o): return True
  def __lt__(s,o): return True
def f(n): return [E()]
""",
        "assert max(f(1))>=1",
    ),
    "evil ordering": (
        """
class E:
  def __gt__(s,o): return True
  __ge__=__lt__=__le__=__gt__
def f(n): return E()
""",
        "assert 1<=f(1)<=3",
    ),
}

RIGHT |= {
    "prints": (
        "def f(): print('hi')",
        "import io, contextlib\nb = io.StringIO()\nwith contextlib.redirect_stdout(b):\n    f()\n"
        "assert b.getvalue() == 'hi\\n'",
    ),
    "exits": ("import sys\ndef f(): sys.exit(3)", "import pytest\nwith pytest.raises(SystemExit):\n    f()"),
    "a method in place": (
        "class Solution:\n    def rotate(self, n, k): n[:] = n[-k:] + n[:-k]",
        "nums = [1, 2, 3]\nSolution().rotate(nums, 1)\nassert nums == [3, 1, 2]",
    ),
    "sends into a generator": (
        "def acc():\n    t = 0\n    while True:\n        t += yield t",
        "g = acc()\nassert next(g) == 0\nassert g.send(5) == 5",
    ),
}

REFUSED = {
    "dataclasses compared": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int",
        "assert P(1) == P(1)",
    ),
    "patched": ("def f(): return input()", "from unittest.mock import patch\nwith patch('builtins.input'):\n    f()"),
    "eq objects": (
        VECTOR,
        "assert Vector(1,2)+Vector(3,4)==Vector(4,6)",
    ),
    "eq method": (
        VECTOR,
        """
v=Vector(1,2).scale(2)
assert v==Vector(2,4)
""",
    ),
    "with suppress own": (
        """
class Ignore:
  def __enter__(self): return self
  def __exit__(self,*a): return a[0] is ValueError
""",
        """
with Ignore():
    raise ValueError('x')
""",
    ),
    "unknown helper": (
        """
def same(a,b): return True
def f(x): return 0
""",
        "assert same(f(1), 2.5)",
    ),
    "unknown helper var": (
        """
def same(a,b): return True
def f(x): return 0
""",
        """
x=f(1)
assert same(x, 2.5)
""",
    ),
    "unknown helper entry": (
        """
def same(a,b): return True
def f(x): return 0
""",
        "assert same(f(1), 2.5)",
        ("f",),
    ),
    "set objs": (
        VECTOR,
        """
assert len({Vector(1,1),Vector(1,1)})==1
assert Vector(1,1).x==1
""",
    ),
    "class cmp": (
        """
class Node:
  def __init__(s): s.v=1
def f(): return Node()
""",
        "assert type(f()) == Node",
    ),
    "numpy missing": (
        "def f(x): return 2",
        """
assert f(1)==2
import numpy_not
assert numpy_not.allclose(f(1),2)
""",
    ),
}


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as one:
        yield one


def verdict(sandbox, code, test, entries=()):
    tests = AssertTests([test.strip("\n")], entries)
    return check(sandbox, code.strip("\n"), tests, limits=Limits(timeout_s=10))[0].verdict


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_is_paid(sandbox, name):
    assert verdict(sandbox, *RIGHT[name]) == "correct"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_program_is_not(sandbox, name):
    assert verdict(sandbox, *WRONG[name]) == "wrong"


@pytest.mark.parametrize("name", REFUSED)
def test_a_test_that_only_the_candidate_could_judge_is_refused(sandbox, name):
    with pytest.raises(ValueError, match="entry_point|own __eq__|reach into|compares|set or a dict|__exit__|numpy_not"):
        verdict(sandbox, *REFUSED[name])


IMPORTS = "import enum\nfrom collections import *\nfrom fractions import Fraction\n"


@pytest.mark.parametrize(
    "code, arguments, expected, lists, want",
    [
        ("def f(x): return 2", [1], 2.0, False, "correct"),
        ("def f(x): return 2.0", [1], 2, False, "wrong"),
        ("def f(x): return 2.0", [1], 2, True, "correct"),
        ("def f(x): return True", [1], 1, True, "wrong"),
        ("def f(x): return 1", [1], True, True, "wrong"),
        ("def f(x): return Counter(x)", ["aab"], {"a": 2, "b": 1}, True, "correct"),
        ("def f(x): return defaultdict(int,a=1)", ["aab"], {"a": 1}, False, "correct"),
        ("P=namedtuple('P','x y')\ndef f(x): return P(1,2)", [1], (1, 2), False, "correct"),
        ("P=namedtuple('P','x y')\ndef f(x): return [P(1,2)]", [1], [[1, 2]], True, "correct"),
        ("def f(x): return {1:2}", [1], {"1": 2}, True, "correct"),
        ("def f(x): x.sort()", [[2, 1]], [1, 2], True, "correct"),
        ("def f(x): x.sort(); return 5", [[2, 1]], [1, 2], True, "wrong"),
        ("class C(enum.IntEnum):\n  A=1\ndef f(x): return C.A", [1], 1, False, "correct"),
        ("def f(x): return Fraction(1,2)", [1], 0.5, False, "correct"),
        (
            "class E(int):\n  def __eq__(s,o): return True\n  def __hash__(s): return 1\ndef f(x): return E(4)",
            [1],
            3,
            False,
            "wrong",
        ),
        (
            "class E(dict):\n  def __eq__(s,o): return True\n  def items(s): return []\ndef f(x): return E()",
            [1],
            {"a": 1},
            True,
            "wrong",
        ),
        ("def f(x): return x.keys()", [{"a": 1}], ["a"], True, "wrong"),
    ],
)
def test_what_a_call_returns_is_compared_by_kind_and_value(sandbox, code, arguments, expected, lists, want):
    tests = CallTests("f", [(tuple(arguments), {})], [expected], lists=lists)
    assert check(sandbox, IMPORTS + code, tests, limits=Limits())[0].verdict == want
