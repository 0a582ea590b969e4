"""Photographs -> batches."""
