"""What a run is asked to do: typed sections, presets, files and overrides, checks between values, derived facts.

Imports errors, util, the layout's arithmetic and the names of schedules; never torch, so that --help and every error of
a configuration come at once. Knows no tensor, no process group and no file of data.
"""
