"""Using a trained model: opening a checkpoint in any layout, generating, comparing with other implementations.

Imports model, checkpoint, interop and the tokenizer. Never knows training or the command line.
"""
