"""What the design of the transformers expected: peaks in GB by row of ``benchmarks/memory.py``, counted before.

Counted on fake tensors for a step in pure bf16 without an optimizer, of blocks with LayerNorm, GELU and four times
their width in the MLP; attention keeps q, k, v and its output. Local learning drops the gradients of a module at once.
Parameters and batch are part of each figure.
"""

from __future__ import annotations

COUNTED: dict[str, dict[str, float]] = {
    "vit-b16": {
        "BP": 15.52,
        "BP checkpointing": 2.73,
        "Greedy K=2 eager": 8.16,
        "Greedy K=4 eager": 4.44,
        "AugLocal d=2 K=4 eager": 5.68,
        "SOLO K=4 eager": 6.96,
        "Greedy K=L eager": 1.98,
        "AugLocal d=2 K=L eager": 3.36,
        "Greedy K=4 eager recompute": 2.12,
    },
    "gpt2-24x1024": {
        "BP": 13.95,
        "BP plain logits": 19.88,
        "BP checkpointing": 2.25,
        "BP checkpointing plain logits": 7.80,
        "Greedy K=2 eager": 7.61,
        "Greedy K=4 eager": 4.52,
        "AugLocal d=2 K=4 eager": 4.91,
        "SOLO K=4 eager": 5.53,
        "Greedy K=L eager": 3.14,
        "AugLocal d=2 K=L eager": 4.17,
        "Greedy K=4 eager recompute": 1.88,
    },
}
