"""Training of the tiny world that ships with the package."""
