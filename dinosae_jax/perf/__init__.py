"""Programs to be compiled or timed, the devices they are compiled for, and what they cost."""
