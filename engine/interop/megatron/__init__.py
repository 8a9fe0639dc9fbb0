"""Megatron-LM's checkpoints, read without unpickling: symbolic -> archive -> dcp, sheets -> folder, names -> source.

Imports checkpoint and config. Never knows training, and never calls anything that a file names.
"""
