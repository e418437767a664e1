"""The settings of a sweep to proved prerequisites and one resolved configuration per stage."""
