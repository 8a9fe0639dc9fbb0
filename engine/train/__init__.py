"""Training: state, step, resuming, the loop, and validation.

Imports everything below: model, pipeline, optim, checkpoint, interop, monitor, data.samples. Never knows the
command line.
"""
