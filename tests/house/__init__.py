"""Conduct of the repository: imports, documentation, building, installing."""
