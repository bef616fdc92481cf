"""What a run will take, before a GPU is rented: memory by stage and rank, tokens, operations, hours, disk.

Memory is not estimated from rules of thumb: the passes are run on tensors without contents (``dry``), and what would be
alive together is added up. Nothing here opens weights, questions are only counted, and the network is not used.
"""
