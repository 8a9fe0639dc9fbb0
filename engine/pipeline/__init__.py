"""Pipeline schedules as data, the passes and checks over them, and the executor that runs that very list.

Plans (actions, passes, check, simulate, schedules, shares, search and its parts) import no torch; stage, executor and
trace do. Never knows the model (a stage is any module from one tensor to another), or where batches come from.
"""
