"""One subgraph's relevance: message passing beside an enumeration of its walks.

Random graphs of growing size under random networks of growing depth, in double precision. The
subgraph is the whole graph, so that every walk counts. Both sides are timed in turn within every
round, and the ratio is the median over rounds. Of long enumerations only some walks are timed, and
the time of all is their mean times the number of walks.

    python benchmarks/subgraph_walks.py --json subgraph_walks.json --picture subgraph_walks.png
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nrm import plot
from nrm.graph_networks import node_layers, node_walks, subgraph
from nrm.measure import Measure
from nrm_reproduce.data import load_molecules
from nrm_reproduce.mutag import make_explainer, walk_relevance, walks_inside
from nrm_reproduce.networks import GIN, load_gin

Row = dict[str, Any]

DEPTHS = (1, 2, 3, 4, 5)
SIZES = (5, 10, 15, 20, 25)
WIDTH = 64
FEATURES = 7
DEGREE = 3
TIMED_WALKS = 60
REPEATS = 20
"""How often a query runs in each round, so that what disturbs one side disturbs the other too."""
AGREE_UP_TO = 400
"""Subgraphs with more walks are not enumerated as a whole to compare the two."""


@dataclass(frozen=True)
class Case:
    """One network on one graph, with a subgraph of it."""

    model: GIN
    adjacency: Tensor
    features: Tensor
    chosen: tuple[int, ...]
    target: int


def random_case(depth: int, size: int) -> Case:
    """A connected graph of about `DEGREE` neighbours a node, and a network of that many blocks."""
    torch.manual_seed(1000 * depth + size)
    model = GIN([[FEATURES, WIDTH, WIDTH], *[[WIDTH, WIDTH, WIDTH]] * (depth - 1)])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # as in the pretrained network: never positive
                parameter.copy_(-0.01 * parameter.abs())
            else:  # so that signals neither grow nor vanish with the depth
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    adjacency = torch.eye(size, dtype=torch.bool)
    for node in range(1, size):
        adjacency[node, int(torch.randint(node, ()))] = True
    while int(adjacency.sum()) - size < min(DEGREE * size // 2, size * (size - 1) // 2):
        a, b = torch.randperm(size)[:2].tolist()
        adjacency[max(a, b), min(a, b)] = True
    features = torch.eye(FEATURES)[torch.randint(FEATURES, (size,))].double()
    model = model.double().eval().requires_grad_(False)
    adjacency = adjacency | adjacency.T
    alive = int(model(adjacency, features).argmax())  # some outputs are zero for every graph
    return Case(model, adjacency, features, tuple(range(size)), alive)


def molecule_case(folder: Path) -> Case:
    """The first ring of the first molecule of MUTAG under the pretrained network."""
    model, _ = load_gin(folder)
    molecule = load_molecules(folder)[0]
    return Case(model, molecule.adjacency, molecule.features, molecule.rings[0], molecule.label)


def measure(case: Case, rounds: int, name: str) -> Row:
    """Seconds of one query, of one walk, of all of them, and of capturing the network."""
    explainer = make_explainer(case.model)
    begin = time.perf_counter()
    explainer.graph(case.adjacency, case.features)
    capture = time.perf_counter() - begin

    def explained() -> Measure:
        return explainer(case.adjacency, case.features, target=case.target)

    R = explained()
    sets = subgraph(node_layers(R), case.chosen)
    depth = len(case.model.blocks)
    count = count_walks(case.adjacency, depth, case.chosen)
    timed = list(islice(walks_inside(case.adjacency, depth, case.chosen), TIMED_WALKS))

    def enumerate_some() -> None:
        for walk in timed:
            walk_relevance(case.model, case.adjacency, case.features, case.target, walk)

    sides: dict[str, Callable[[], object]] = {
        "query": lambda: R(*sets),
        "explain_and_query": lambda: explained()(*sets),
        "enumeration": enumerate_some,
        "all_walks": lambda: node_walks(R, max_walks=10**7),
    }
    if count > 20_000:
        del sides["all_walks"]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 1):  # the first warms up
        keys = list(sides)
        for side in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
            gc.collect()
            begin = time.perf_counter()
            repeats = REPEATS if side in ("query", "explain_and_query") else 1
            for _ in range(repeats):
                sides[side]()
            if turn:
                seconds[side].append((time.perf_counter() - begin) / repeats)
    scale = count / len(timed)
    enumerated = [scale * s for s in seconds["enumeration"]]
    return {
        "case": name,
        "layers": depth,
        "nodes": len(case.adjacency),
        "walks": count,
        "walks_timed": len(timed),
        "capture_seconds": capture,
        "query_seconds": statistics.median(seconds["query"]),
        "explain_and_query_seconds": statistics.median(seconds["explain_and_query"]),
        "enumeration_seconds": statistics.median(enumerated),
        "all_walks_seconds": statistics.median(seconds["all_walks"])
        if "all_walks" in seconds
        else None,
        "load": os.getloadavg()[0],
        "ratio": ratio(enumerated, seconds["query"]),
        "ratio_with_forward_pass": ratio(enumerated, seconds["explain_and_query"]),
        "logit": float(R.scale[0]),
        "difference": difference(case, R, count) if count <= AGREE_UP_TO else None,
    }


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def count_walks(adjacency: Tensor, steps: int, chosen: Sequence[int]) -> int:
    inside = adjacency[list(chosen)][:, list(chosen)].double()
    return int(torch.linalg.matrix_power(inside, steps).sum())


def difference(case: Case, R: Measure, count: int) -> float:
    """How far the query is from the sum over all walks, relative to the sum of their sizes."""
    layers = node_layers(R)
    walks = [
        walk_relevance(case.model, case.adjacency, case.features, case.target, walk)
        for walk in walks_inside(case.adjacency, len(case.model.blocks), case.chosen)
    ]
    assert len(walks) == count
    each = torch.stack(walks)
    own = R(*subgraph(layers, case.chosen)) * R.scale
    return float((own[0] - each.sum()).abs() / each.abs().sum().clamp(min=1e-300))


def table(rows: Sequence[Row]) -> str:
    head = ["case", "layers", "nodes", "walks", "query", "with forward", "enumeration", "ratio"]
    lines = [[*head, "with forward", "difference"]]
    for row in rows:
        off = row["difference"]
        lines.append(
            [
                row["case"],
                str(row["layers"]),
                str(row["nodes"]),
                str(row["walks"]),
                f"{1e3 * row['query_seconds']:.2f} ms",
                f"{1e3 * row['explain_and_query_seconds']:.2f} ms",
                f"{1e3 * row['enumeration_seconds']:.4g} ms",
                f"{row['ratio']:.3g}",
                f"{row['ratio_with_forward_pass']:.3g}",
                "-" if off is None else f"{off:.1e}",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def draw(rows: Sequence[Row], file: Path) -> None:
    """Time over the number of nodes, a line for each depth; both on logarithmic scales."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, ScalarFormatter

    figure = Figure(figsize=(8.6, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    random = [row for row in rows if row["case"] == "random"]
    depths = sorted({row["layers"] for row in random})
    colours = colormaps["viridis"]
    for place, depth in enumerate(depths):
        own = [row for row in random if row["layers"] == depth]
        colour = colours(0.85 * place / max(1, len(depths) - 1))
        nodes = [row["nodes"] for row in own]
        milliseconds = [1e3 * row["enumeration_seconds"] for row in own]
        left.plot(nodes, milliseconds, color=colour, marker="o", markersize=4, linestyle="--")
        left.plot(
            nodes,
            [1e3 * row["query_seconds"] for row in own],
            color=colour,
            marker="o",
            markersize=4,
        )
        label = f"{depth} layer{'s' if depth > 1 else ''}"
        ratios = [row["ratio"] for row in own]
        right.plot(nodes, ratios, color=colour, marker="o", markersize=4, label=label)
    left.set_title("solid: message passing; dashed: walk by walk", fontsize=9)
    left.set_ylabel("milliseconds for one subgraph", fontsize=9)
    right.set_title("how many times faster", fontsize=9)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside right center", fontsize=8, frameon=False
    )
    for ax in (left, right):
        ax.set_yscale("log")
        ax.set_xlabel("nodes", fontsize=9)
        ax.xaxis.set_major_locator(FixedLocator(sorted({row["nodes"] for row in random})))
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.25)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    plot.save(figure, file)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--picture", type=Path, help="where to draw them")
    parser.add_argument("--data", type=Path, help="folder of MUTAG, for one of its molecules")
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    if options.data:
        rows.append(measure(molecule_case(options.data), options.rounds, "MUTAG ring"))
    for depth in map(int, options.depths.split(",")):
        for size in map(int, options.sizes.split(",")):
            rows.append(measure(random_case(depth, size), options.rounds, "random"))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.picture:
        draw(rows, options.picture)
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
