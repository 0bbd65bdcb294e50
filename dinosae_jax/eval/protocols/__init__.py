"""How an autoencoder, a flow or a file of samples is measured, step by step."""
