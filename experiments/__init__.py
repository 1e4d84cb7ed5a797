"""Experiment scripts: one for each table or figure, run as `python -m experiments.NAME`."""
