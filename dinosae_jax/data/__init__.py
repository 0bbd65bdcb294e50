"""Image sources, crops, the embedded photographs and the latent cache."""
