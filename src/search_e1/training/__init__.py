"""The trainer that GRPO, distillation and cold start share: the loop, resuming, smaller passes when memory runs out, and the
teacher-student divergence."""
