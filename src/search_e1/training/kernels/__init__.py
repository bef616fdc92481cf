"""Triton kernels for the loss and gradient of a chunk's logits in the fused passes over the head."""
