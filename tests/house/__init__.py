"""Rules of the repository: imports, documentation, building, installing."""
