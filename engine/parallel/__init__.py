"""Algorithms that move data between ranks outside the forward pass: gradients in flat buckets.

Imports distributed. Never knows which layers the parameters belong to, or which schedule runs.
"""
