"""Programs to compile or time, the devices they are compiled for, and their costs."""
