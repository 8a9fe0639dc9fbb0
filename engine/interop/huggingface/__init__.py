"""Hugging Face folders: one table a family, config.json, weights, and the files beside them.

Imports checkpoint, config and model's shapes; `families` and `config_json` no torch, as the config reads presets and
model.* from them. Never knows training, and never runs code of a folder.
"""
