"""Other projects' models, in and out: Hugging Face folders, Megatron-LM checkpoints.

Each is a source of rectangles of canonical tensors, like a checkpoint. Imports checkpoint, config, model's shapes and
the tokenizer's files. Never knows training.
"""
