"""What a trained network is used for: photographs in, answers out."""
