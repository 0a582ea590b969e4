"""From weights to evidence: metrics, their uncertainty and the files that hold them."""
