"""Training: state, step, resuming, the loop, and validation.

Imports everything below: model, pipeline, optim, checkpoint, interop, inference.load, monitor, data.samples, the
tokenizer. Never knows the command line.
"""
