"""Trident: a 3D-parallel (tensor x pipeline x data) training engine for language models."""

__version__ = "0.1.0"
