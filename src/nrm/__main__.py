"""`python -m nrm` is the command `nrm`."""

from nrm.cli import main

if __name__ == "__main__":
    main()
