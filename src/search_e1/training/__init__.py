"""What GRPO, distillation and cold start share of a trainer: going on after a kill, smaller batches when memory runs out, and
the divergence of two roles of a policy."""
