"""`python -m lightning_rlvr`."""

from lightning_rlvr.cli import main

if __name__ == "__main__":
    main()
