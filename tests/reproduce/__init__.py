"""Tests of the paper's experiments, one file for each of `nrm_reproduce`."""
