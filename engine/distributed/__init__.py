"""Ranks and what flows between them: layout, context, collectives, shared memory, launching, specs of shards.

Imports config (torch-free parts here may be imported by it: layout, board). Nothing else calls torch.distributed. Never
knows a model, a schedule or a corpus.
"""
