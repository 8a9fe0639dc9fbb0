"""Hugging Face folders: one table a family, config.json, weights, and the files beside them.

`families` and `config_json` import no torch; the config reads presets and model.* from them.
"""
