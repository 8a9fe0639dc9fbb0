"""AdamW over flat buckets, gradient clipping, learning rate schedules, precision and fp16 loss scaling.

Imports parallel, distributed, ops (kernels) and config. Never knows the model's classes or checkpoints.
"""
