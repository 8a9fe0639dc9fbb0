"""Update rules and parameter groups over flat buckets, clipping, learning rate schedules, precision and loss scaling.

Imports parallel, distributed, ops (kernels) and config. Never knows the model's classes or checkpoints.
"""
