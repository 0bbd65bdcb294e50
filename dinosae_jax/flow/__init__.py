"""Riemannian flow matching: the manifold, the training path, samplers and guidance."""
