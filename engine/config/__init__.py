"""Configuration of a run: typed sections, presets, files and overrides, checks between values, derived values.

Imports errors, the layout's arithmetic, pipeline's plans, planner and the tables of Hugging Face families; never torch,
so that --help and all config errors appear immediately. Never knows tensors, process groups or corpora.
"""
