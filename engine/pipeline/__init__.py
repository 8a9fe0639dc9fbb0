"""Pipeline schedules as data, the passes and checks over them, and the executor that runs the checked plan.

Plans (actions, passes, check, simulate, schedules, search and its parts, timeline, draw) import errors and util, never
torch; stage, executor and trace import batch, distributed, ops and parallel. Never knows the model (a stage is any
module that maps one tensor to another), or where batches come from.
"""
