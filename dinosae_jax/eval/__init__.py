"""Metrics, each with the recipe that its value depends on."""
