"""Fine-tune a classifier on a snapshot, on the cluster that this machine belongs to: see ``python jobs/train.py --help``.

The last line printed is one JSON object.
"""

from dragonclf.cli import job

if __name__ == "__main__":
    job("train")
