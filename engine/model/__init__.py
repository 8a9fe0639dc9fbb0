"""The Transformer: the readable part. No parallel degree is ever tested here.

Imports ops, distributed, config, batch. Never knows pipeline plans, optimizers, data or checkpoints.
"""
