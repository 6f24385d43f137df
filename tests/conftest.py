"""Fixtures that several test files share."""

from __future__ import annotations

import warnings
from types import ModuleType

import pytest
import torch

torch.set_num_threads(1)  # networks are small; two threads that wait for each other are slower


@pytest.fixture(scope="session")
def torchvision_models() -> ModuleType:
    """torchvision's models, also where its compiled operators do not fit the installed torch."""
    pytest.importorskip("typer", reason="the command line's packages are not installed")
    from nrm.cli.torchvision_mismatch import import_torchvision

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torchvision's compiled operators", RuntimeWarning)
        try:
            torchvision = import_torchvision()
        except ModuleNotFoundError as error:
            pytest.skip(f"torchvision is not installed: {error}")
    models: ModuleType = torchvision.models
    return models
