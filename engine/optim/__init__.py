"""AdamW over flat buckets, clipping from ShardSpecs, the learning rate, precision.

Imports parallel, distributed, ops (kernels) and config. Never knows the model's classes or where states are saved.
"""
