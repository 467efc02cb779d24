"""Score every object under a prefix, on the cluster that this machine belongs to: see ``python jobs/score.py --help``.

The last line printed is one JSON object.
"""

from dragonclf.cli import job

if __name__ == "__main__":
    job("score")
