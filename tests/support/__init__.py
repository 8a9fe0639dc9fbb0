"""Helpers of several test modules: ranks, configs, models, corpora, test doubles. Contains no tests."""
