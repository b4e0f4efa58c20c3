"""The training loop: `trainer` from top to bottom, and its parts, each in a module that bears its name.

Batches, optimizer step, schedule, metrics, evaluation and distillation are here; what is written and shown is not.
"""
