"""The paper's experiments, one file each (section 4), run by `python -m nrm.experiments.NAME`."""
