"""Inference with trained networks: the public classes and their compiled programs."""
