"""Random small networks, composites and queries against an oracle that shares nothing with nrm.

    python tests/fuzzing.py --seconds 3600 --seed 0     # as long as you like, on fresh seeds
    python tests/fuzzing.py --seed 17 --count 1         # one again, made as small as it goes

`tests/test_fuzz.py` runs some seeds with every run of the suite.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence

import torch
from support.fuzz.cases import Case, alike

import nrm


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, help="how many seeds")
    parser.add_argument("--seconds", type=float, help="how long")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", nrm.RelevanceWarning)
    count = options.count or (None if options.seconds else 100)
    begun, seed, failed = time.monotonic(), options.seed, 0
    while (count is None or seed < options.seed + count) and (
        options.seconds is None or time.monotonic() - begun < options.seconds
    ):
        case = Case.drawn(seed)
        found = next(case.findings(), None)
        if found is not None:
            failed += 1
            small = case.smaller(found)
            shown = next((f for f in small.findings() if alike(found, f)), found)
            _say(f"\n{small}\n{shown}")
        seed += 1
        if (seed - options.seed) % 100 == 0:
            spent = time.monotonic() - begun
            _say(f"{seed - options.seed} seeds, {failed} failed, {spent:.0f} s")
    _say(f"seeds {options.seed} to {seed - 1}: {failed} failed, {time.monotonic() - begun:.0f} s")
    return int(failed > 0)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
