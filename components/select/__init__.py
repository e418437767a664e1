"""The rows of every arm."""
