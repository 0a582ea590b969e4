"""Probabilities -> what a person is told. NumPy alone."""
