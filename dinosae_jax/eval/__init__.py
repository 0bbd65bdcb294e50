"""Metrics that state their recipe, pictures and the report."""
