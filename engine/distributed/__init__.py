"""Ranks and their communication: layout, context, collectives, shared memory, launching, specs of shards.

Imports errors and util. Nothing else calls torch.distributed or reads the environment. layout and board need no torch:
config may import them. Never knows a config, a model, a schedule or a corpus.
"""
