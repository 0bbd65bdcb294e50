"""One file per thing that a user runs."""
