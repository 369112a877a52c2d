"""The demo, for several seeds, and its control with shuffled rewards: held-out pass@1 before and after, and seconds.

    python benchmarks/demo.py [--seeds 0 1 2] [--no-control] [--json]

Target: on two cores, at most 480 s for the steps and both evaluations, pass@1 up by at least 40 points to at least
70 %, for every seed; the control, whose every completion gets the scores of another one of its group, does not improve.
The control is evaluated with the true rewards: its last checkpoint by `rlzero eval`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

RUNS = Path("runs")
SHUFFLED = ["rewards.0.fn=./benchmarks/shuffled.py:countdown", "rewards.1.fn=./benchmarks/shuffled.py:tags"]


def rlzero(*arguments: str) -> str:
    command = [sys.executable, "-m", "rlzero.cli", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def train(name: str, seed: int, overrides: list[str]) -> dict:
    shutil.rmtree(RUNS / name, ignore_errors=True)
    rlzero("train", "configs/demo.yaml", f"name={name}", f"seed={seed}", *overrides)
    return json.loads((RUNS / name / "summary.json").read_text())


def held_out(policy: str) -> float:
    printed = rlzero("eval", "configs/demo.yaml", "--policy", policy)
    return float(next(line.split()[1] for line in printed.splitlines() if line.startswith("pass_at_1 ")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-control", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        found = train(f"demo-seed{seed}", seed, [])
        before, after = found["pass_at_1_before"], found["pass_at_1_after"]
        rows += [
            {"name": f"seed {seed}: pass@1", "value": after, "unit": "share", "peer": "before", "peer_value": before},
            {"name": f"seed {seed}: wall", "value": found["wall_s"], "unit": "s", "peer": "target", "peer_value": 480},
        ]
    if not arguments.no_control:
        train("demo-control", 0, [*SHUFFLED, "evaluation.every=0"])
        before, after = held_out("configs/demo-base"), held_out("runs/demo-control")
        rows.append({"name": "control, shuffled rewards: pass@1 after", "value": after, "unit": "share",
                     "peer": "before", "peer_value": before})  # fmt: skip
    for row in rows:
        row["ratio"] = row["value"] / row["peer_value"]
        if not arguments.json:
            print(f"{row['name']:<42} {row['value']:8.3f} {row['unit']:<6} {row['peer']} {row['peer_value']:.3f}")
    if arguments.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
