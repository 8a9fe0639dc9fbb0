"""What several test modules use: ranks, configs, models, corpora, doubles. Nothing here is a test."""
