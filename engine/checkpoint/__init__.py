"""The checkpoint format (safetensors + JSON manifest), saving, loading in any layout, Hugging Face names."""
