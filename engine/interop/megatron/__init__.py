"""Reads Megatron-LM checkpoints without unpickling them.

Layers: symbolic -> archive -> dcp, sharded_tensor -> folder, names -> source. Imports checkpoint and config.
Never knows training, and never calls anything that a file names.
"""
