"""Apply a new head to the embeddings of a scored run, on the cluster that this machine belongs to: see ``python jobs/rescore.py --help``.

The last line printed is one JSON object.
"""

from dragonclf.cli import job

if __name__ == "__main__":
    job("rescore")
