"""Weights -> answers about new photographs."""
