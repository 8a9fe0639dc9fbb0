"""Hugging Face folders: a table for each model family, config.json, weights, and companion files.

Imports checkpoint, config and the model's shapes. `families` and `config_json` do not import torch, because the config
reads presets and model.* from them. Never knows training, and never runs code from a folder.
"""
