"""Our own format and nothing else: safetensors and a JSON manifest, saved and loaded in any layout.

Imports distributed and optim (the states that it saves). Never knows other projects' formats: interop does.
"""
