"""Triton kernels for what the fused passes over the head do with the logits of a chunk."""
