"""Benchmarks, one file each; `rlzero eval MODEL --tasks gsm8k,math500` runs them (see task.py)."""
