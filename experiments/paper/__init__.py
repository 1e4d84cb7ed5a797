"""The paper's tables, one thin declaration each, for one runner: `python -m experiments.paper --help`."""
