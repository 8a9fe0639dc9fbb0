"""Model types, their declarations and modules. No code here branches on a parallel degree.

Start with build.py (the registry) and transformer.py; layers.py has the shape legend. declarations.py and build.py need
no torch. Imports ops, distributed, config and batch. Never knows pipeline plans, optimizers, data or checkpoints.
"""
