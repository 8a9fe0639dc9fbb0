"""Training: state, step, resuming, the loop, and validation.

Imports all lower packages: model, pipeline, optim, checkpoint, interop, inference.load, monitor, data.samples, the
tokenizer. Never knows the command line.
"""
