"""Scripts that train, evaluate, and regenerate tables and figures: `python -m experiments.NAME --help`."""
