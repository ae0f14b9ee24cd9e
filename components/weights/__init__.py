"""Weights of other code bases as models of ours."""
