"""Training: state, optimizer, the two steps, their tasks, the loop and the stages."""
