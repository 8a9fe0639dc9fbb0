"""Using a trained model: load a checkpoint in any layout, generate text, compare with other implementations.

Imports model, checkpoint, interop and the tokenizer. Never knows training or the command line.
"""
