"""``python -m dragonclf``: the command line."""

from dragonclf.cli import main

if __name__ == "__main__":
    main()
