"""Estimates from the config alone, without running: parameters, FLOPs, memory.

Imports config, the declarations of model types and pipeline's plans, never torch. Never knows a tensor: every estimate
follows from the config.
"""
