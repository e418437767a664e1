"""A finished output of another run, proved against its identity."""
