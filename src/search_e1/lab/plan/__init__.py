"""Plans a run before a GPU is rented: memory of each stage, tokens, operations, hours, disk.

Computed with real modules (`trace.py`, `shapes.py`): weights, gradients, optimizer states and activations, counted on tensors
that have a shape and no memory. Computed by formula: the pass over the output head, the key-value cache, layers gathered
under FSDP2 (`memory.py`), operations and hours (`work.py`). All constants are in `constants.toml`.
"""

from search_e1.lab.plan.plan import check_memory

__all__ = ["check_memory"]
