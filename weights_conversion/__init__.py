"""PyTorch checkpoints to this project and back."""
