"""The answer as an exit status."""
