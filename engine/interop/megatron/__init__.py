"""Megatron-LM's checkpoints, read without unpickling: symbolic -> archive -> dcp, sheets -> files, names -> source."""
