"""Loss terms: functions of arrays and callables, never of models."""
