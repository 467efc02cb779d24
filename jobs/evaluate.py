"""Measure a model on a split and write its report, on the cluster that this machine belongs to: see ``python jobs/evaluate.py --help``.

The last line printed is one JSON object.
"""

from dragonclf.cli import job

if __name__ == "__main__":
    job("evaluate")
