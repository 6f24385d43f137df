"""How long a click in the explorer takes, beside the passes that it needs.

    python -m benchmarks.explore --json explore.json
    python -m benchmarks.explore --network digits --clicks 50

A click goes to a server on this machine and back, as from the page: the selection of one random
channel that is shown, or of two in different columns. `first` is until the columns and the heatmap
are there, `all` until the last flow is; `passes` is the library alone, asked for the same
marginals, and `beyond` the difference between it and `first`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nrm
from nrm.cli import opening
from nrm.cli.report import versions
from nrm.explore.opened import Opened
from nrm.explore.selection import parse
from nrm.explore.serving import running
from nrm.measure import Measure

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"


def squeezenet() -> Opened:
    """With a photograph."""
    picture = next((DATA / "imagenet").glob("*robin*.JPEG"))
    return opening.pictures(
        "torchvision.models:squeezenet1_0", DATA / "squeezenet" / "squeezenet1_0.safetensors",
        [picture], None, "imagenet", 224, "auto", lambda text: None,
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], Opened]] = {
    "digits": lambda: opening.digits(lambda text: None),
    "squeezenet": squeezenet,
}


def examples() -> dict[str, Callable[[], Opened]]:
    """What `examples/explore.py` opens."""
    folder = Path(__file__).parents[1] / "examples"
    sys.path.append(str(folder))
    made = runpy.run_path(str(folder / "explore.py"))
    return {
        "series": made["series"],
        "sentences": lambda: made["sentences"](*made["SENTENCES"][0]),
        "molecules": lambda: made["molecules"](DATA / "graphs"),
    }


class Tab:
    """A tab of a browser, without the browser."""

    def __init__(self, address: str) -> None:
        where = urlsplit(address)
        self._connection = http.client.HTTPConnection(where.netloc)
        self._root = where.path
        self.opened = json.loads(self._post("open", {}).read())
        self._session = self.opened["session"]

    def _post(self, path: str, body: Any) -> http.client.HTTPResponse:
        self._connection.request("POST", f"{self._root}api/{path}", json.dumps(body))
        return self._connection.getresponse()

    def click(self, selection: Any) -> tuple[float, float, list[dict[str, Any]]]:
        """Milliseconds until the columns are there and until all is, and the answer."""
        request = {"columns": self.opened["first"], "selection": selection}
        begin = time.perf_counter()
        body = {"session": self._session, "input": 0, "request": request}
        answer = self._post("view", body)
        parts, first = [], 0.0
        while line := answer.readline():
            parts.append(json.loads(line))
            if parts[-1]["kind"] == "columns":
                first = 1000 * (time.perf_counter() - begin)
        return first, 1000 * (time.perf_counter() - begin), parts


def alone(R: Measure, layers: list[str], selection: Any) -> float:
    """Milliseconds of the same marginals without the explorer."""
    selected = parse(selection, R)
    assert selected is not None
    begin = time.perf_counter()
    R.marginals(selected.formula, layers=layers)
    return 1000 * (time.perf_counter() - begin)


def measured(opened: Opened, clicks: int, seed: int = 0) -> dict[str, Any]:
    """Medians and 95th percentiles over random clicks."""
    chance = random.Random(seed)
    R = opened.measure(opened.inputs[0])
    rows: list[dict[str, float]] = []
    with running(opened) as address:
        tab = Tab(address)
        layers = [R.graph.inputs[0].name, *tab.opened["first"], R.graph.output.name]
        columns = tab.click(None)[2][1]["columns"]
        for _ in range(clicks):
            parts = [
                {"layer": c["layer"], "channels": [chance.choice(c["nodes"])["index"]]}
                for c in chance.sample(columns, chance.choice([1, 2]))
            ]
            selection = {"op": "and", "parts": parts}
            passes = alone(R, layers, selection)
            first, whole, answer = tab.click(selection)
            count = answer[-1]["cost"]["passes"]
            rows.append(
                {"first": first, "all": whole, "passes": passes, "beyond": first - passes,
                 "messages": count}
            )  # fmt: skip
    found: dict[str, Any] = {"clicks": clicks}
    for name in rows[0]:
        values = sorted(row[name] for row in rows)
        found[name] = {
            "median": statistics.median(values),
            "p95": values[min(len(values) - 1, int(0.95 * len(values)))],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", action="append", help="digits or squeezenet: by default both")
    parser.add_argument("--clicks", type=int, default=50)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    names = given.network or list(NETWORKS)
    results = {}
    for name in names:
        results[name] = found = measured(NETWORKS[name](), given.clicks)
        sys.stdout.write(f"{name}\n")
        for what in ("first", "all", "passes", "beyond", "messages"):
            unit = "" if what == "messages" else " ms"
            one = found[what]
            figures = f"median {one['median']:8.1f}{unit}, 95 % {one['p95']:8.1f}{unit}"
            sys.stdout.write(f"  {what:9} {figures}\n")
    if given.json is not None:
        whole = {
            "nrm": nrm.__version__,
            "versions": versions(),
            "load": os.getloadavg(),
            "explore": results,
        }
        given.json.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
