"""The configuration of a whole run to proved prerequisites, digests, and one resolved configuration per stage."""
