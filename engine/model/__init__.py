"""The Transformer: blocks, attention, MLP, parallel layers. No code here branches on a parallel degree.

Start with transformer.py; layers.py has the shape legend. Imports ops, distributed, config and batch. Never knows
pipeline plans, optimizers, data or checkpoints.
"""
