"""One policy on several GPUs: who the ranks are (ranks.py), how they share its weights (policy.py), its experts
(experts.py, gather.py, with slots.py and rows.py), its layers (pipeline.py) and its checkpoints (checkpoint.py).
docs/parallel.md tells what runs and what does not."""
