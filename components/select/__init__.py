"""The rows that Select-MoE picks, and why each of them (arm `selected`)."""
