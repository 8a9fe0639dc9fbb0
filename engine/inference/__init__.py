"""Using a trained model: opening a checkpoint in any layout, generating, comparing with other implementations.

Imports model, checkpoint, interop. Never knows training or the command line.
"""
