"""Run all of the paper's tables and figures: `python -m experiments.paper --scale digits`; `--list` lists them."""

from experiments import command_line
from experiments.paper.runner import run

if __name__ == "__main__":
    command_line.run(lambda argv: run(None, argv))
