"""Prints every attack and what became of it; exit code 1 when one succeeded."""

from rewards.sandbox import Sandbox
from tests.rewards.attacks.run import run_attacks

with Sandbox() as sandbox:
    rows = run_attacks(sandbox)
for row in rows:
    state = f"SUCCEEDED: {row.succeeded}" if row.succeeded else "blocked"
    print(f"{row.name[:44]:44} {row.kind:8} {row.verdict:8} {row.seconds:6.2f} s  {state}  {row.why[:70]!r}")
print(f"{len(rows)} attacks, {sum(bool(row.succeeded) for row in rows)} succeeded")
raise SystemExit(any(row.succeeded for row in rows))
