"""`python -m nrm` is the command `nrm`."""

from nrm.cli import main, working_folder_last

if __name__ == "__main__":
    working_folder_last()
    main()
