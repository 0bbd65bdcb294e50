"""Trained networks at work: the public classes and their compiled programs."""
