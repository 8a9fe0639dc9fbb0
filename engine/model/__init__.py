"""The Transformer: the readable part. No parallel degree is ever tested here.

Imports ops, distributed, config. Never knows pipeline plans, optimizers, data or checkpoints.
"""
