"""Monitoring of a run: metrics, progress, non-finite values, spikes, plots, exit record.

Imports the packages that it reports on: config, distributed, ops, pipeline, and the validation score. Changes no state
of the run, and never knows the training loop.
"""
