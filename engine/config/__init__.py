"""What a run is asked to do: typed sections, presets, files and overrides, checks between values, derived facts.

Imports errors, the layout's arithmetic, pipeline's plans, planner and the tables of Hugging Face families; never torch,
so that --help and every error of a configuration come at once. Never knows a tensor, a process group or a corpus.
"""
