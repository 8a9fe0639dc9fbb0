"""Counting before running: parameters, floating-point operations, memory.

Imports config and pipeline's plans; never torch. Never knows a tensor: what it counts follows from the config.
"""
