"""Print what is installed, on one line: what a test run or a demo ran with."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("nrm", "torch", "torchvision", "transformers", "numpy")


def installed() -> str:
    """The versions of the packages that there are."""
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return "versions: " + ", ".join(found)


if __name__ == "__main__":
    sys.stdout.write(installed() + "\n")
