"""`python -m nrm_reproduce NAME` is `nrm reproduce NAME`, without anything installed."""

import typer

from nrm_reproduce.command import reproduce

if __name__ == "__main__":
    typer.run(reproduce)
