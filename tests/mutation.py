"""Changes that the tests have to notice: signs, axes, dropped terms, skipped branches.

    python tests/mutation.py                     # all of them, one at a time: hours on two cores
    python tests/mutation.py --only gamma box    # those whose name has one of these words
    python tests/mutation.py --targeted          # run only the tests named first, not all

Each is made in a copy of the tree, never in the checkout. The tests named with it run first and,
where they notice nothing, all others. What is printed says of every change which test noticed it;
that it survived; or that its text is gone, so that it has to be written anew. A text is looked for
in the whole library, so that a change survives when code moves to another file.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("src", "tests", "benchmarks", "examples", "docs", "pyproject.toml", "README.md")
FIRST_FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """A change of one text.

    Attributes:
        name: what it does, in a few words.
        old: a text that the library has exactly once.
        new: what stands in its place.
        tests: the files of tests that should notice it, without `test_` and `.py`.
    """

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


HAND = ("rules", "values_by_hand")
WALKS = ("query_walks", "whole_networks", "operators_walks")

MUTANTS = (
    # -- rules -------------------------------------------------------------------------------------
    Mutant(
        "plain gamma raises negative weights",
        "derive(self, lambda v: v + self.gamma * v.clamp(min=0))",
        "derive(self, lambda v: v + self.gamma * v.clamp(max=0))",
        HAND,
    ),
    Mutant(
        "gamma: columns below zero raise what opposes them",
        "oppose: list[Term] = [(x.positive, raise_negative)]",
        "oppose: list[Term] = [(x.positive, raise_positive)]",
        WALKS,
    ),
    Mutant(
        "gamma: negative parents with the other weight",
        "agree.append((x.negative, raise_negative))",
        "agree.append((x.negative, raise_positive))",
        WALKS,
    ),
    Mutant(
        "gamma: the opposed sum off by one",
        "torch.sub((2 + self.gamma) * own_sum, first)",
        "torch.sub((1 + self.gamma) * own_sum, first)",
        WALKS,
    ),
    Mutant(
        "gamma: both signs of columns weigh the same",
        "return [1 - below, -below]",
        "return [1 - below, below]",
        ("query_walks",),
    ),
    Mutant(
        "alpha-beta without alpha",
        "torch.where(positive > tiny, self.alpha / positive, 0.0)",
        "torch.where(positive > tiny, 1.0 / positive, 0.0)",
        WALKS,
    ),
    Mutant(
        "alpha-beta adds its negative part",
        "-self.beta / negative",
        "self.beta / negative",
        WALKS,
    ),
    Mutant("w2 without the square", '("square", torch.square)', '("square", torch.abs)', HAND),
    Mutant(
        "z+ takes negative parents with the other weight",
        "terms.append((x.negative, w.negative))",
        "terms.append((x.negative, w.positive))",
        WALKS,
    ),
    Mutant(
        "a box: the upper bound with the other weight",
        "[[(above, w.positive), (below, w.negative)]]",
        "[[(above, w.positive), (below, w.positive)]]",
        HAND,
    ),
    Mutant("a box that is too forgiving", "slack = 1e-4 *", "slack = 1e-3 *", HAND),
    Mutant("a box that forgives nothing", "slack = 1e-4 *", "slack = 0.0 *", HAND),
    Mutant(
        "explicit zeros are parents under flat rules",
        "return self.real.to(self.value.dtype)",
        "return self.every",
        ("zeros",),
    ),
    Mutant(
        "values share by how many factors there are",
        "return [value / sum(values) for value in values]",
        "return [value / len(values) for value in values]",
        ("operators_walks",),
    ),
    Mutant(
        "a scale takes its share of a norm written out",
        "gate < SCALE or min(gates) >= SCALE",
        "gate <= SCALE or min(gates) >= SCALE",
        ("whole_networks", "composites_defaults"),
    ),
    Mutant(
        "gates take what values should",
        "self.gate / others for value in values",
        "self.value / others for value in values",
        ("operators_walks",),
    ),
    # -- columns and operators ---------------------------------------------------------------------
    Mutant(
        "epsilon stabilises nothing",
        "max(self.rule.stabilizer, column_floor(total.dtype))",
        "column_floor(total.dtype)",
        HAND,
    ),
    Mutant(
        "a vanished column is not divided among its parents",
        "stranded / count.clamp(min=0.5)",
        "stranded * count.clamp(min=0.5)",
        ("rules", "query_walks"),
    ),
    Mutant(
        "same padding begins on the other side",
        'r // 2 if padding == "same"',
        '(r + 1) // 2 if padding == "same"',
        ("values_by_hand",),
    ),
    Mutant(
        "a dilated kernel is read without gaps",
        "begin = place * self.dilation[axis]",
        "begin = place",
        ("rules_occlusion", "values_by_hand"),
    ),
    Mutant(
        "messages are handed on in memory that others see",
        "(self.exclusive and dense(part))",
        "dense(part)",
        ("engine_memory_of_others",),
    ),
    Mutant(
        "a norm's centring with the other sign",
        "return scale, -scale / grouped.shape[-1], None",
        "return scale, scale / grouped.shape[-1], None",
        ("operators_walks", "whole_networks"),
    ),
    Mutant(
        "a softmax's rest is off by one",
        "share * (1 - x + (share * x)",
        "share * (2 - x + (share * x)",
        ("operators_walks",),
    ),
    Mutant(
        "a batch norm's shift with the other sign",
        "shift = -mean * scale",
        "shift = mean * scale",
        ("query_walks",),
    ),
    Mutant(
        "what is subtracted is added as a bias",
        "x.new_empty((), dtype=kind)) * sign",
        "x.new_empty((), dtype=kind))",
        ("values_by_hand",),
    ),
    Mutant(
        "the addend of a product without its factor",
        'call[self.addend] * float(call["beta"])',
        "call[self.addend]",
        ("rules_fixed_weights", "operators_walks"),
    ),
    Mutant(
        "occlusion without what is left for the bias",
        "parts[:-1] if rests else parts",
        "parts",
        ("rules_occlusion",),
    ),
    Mutant(
        "the factor is looked for on its own side",
        "weight: Tensor = both[1 - side]",
        "weight: Tensor = both[side]",
        ("operators_walks",),
    ),
    # -- the engine --------------------------------------------------------------------------------
    Mutant(
        "what has arrived travels on",
        "return {} if mask is None else {(): message * (1 - mask)}",
        "return {} if mask is None else {(): message}",
        WALKS,
    ),
    Mutant(
        "all of a message arrives, whatever the mask",
        "self.arrived[variable] = message if mask is None else message * mask",
        "self.arrived[variable] = message",
        WALKS,
    ),
    Mutant(
        "of two branches only the last counts",
        "piece if before is None else before + piece",
        "piece",
        WALKS,
    ),
    Mutant(
        "walks are not kept within a set",
        "messages = {state: message * way for",
        "messages = {state: message for",
        ("query_walks", "values_by_hand"),
    ),
    Mutant(
        "what the caller gave is written over",
        "message.clone() if id(message) in lent else message",
        "message",
        ("engine_memory_of_others", "query_walks"),
    ),
    # -- sets, queries, search ---------------------------------------------------------------------
    Mutant(
        "a set of one layer is cut where it should be united",
        "picked[variable] | mask if variable in picked",
        "picked[variable] & mask if variable in picked",
        ("query_walks", "measure"),
    ),
    Mutant(
        "some of a layer counts as all of it",
        "None if bool(mask.all()) else",
        "None if bool(mask.any()) else",
        ("query_walks",),
    ),
    Mutant(
        "of samples that are told apart by passes, only the last counts",
        "found[state] + relevance if state in found else relevance\n            return found",
        "relevance\n            return found",
        ("batches",),
    ),
    Mutant(
        "additive relevance with one layer more",
        "return visits / (depth(self.graph) if",
        "return visits / (1 + depth(self.graph) if",
        ("formulas", "measure"),
    ),
    Mutant(
        "the smallest flows are the largest",
        'return values if order == "largest" else -values',
        "return values",
        ("search",),
    ),
    Mutant(
        "bounds twice as wide as they need be",
        "bounds.append(((total - size) / 2, (total + size) / 2))",
        "bounds.append((total - size, total + size))",
        ("search",),
    ),
    Mutant(
        "the best continuation bounds nothing",
        "high = torch.minimum(high, highest",
        "high = torch.maximum(high, highest",
        ("search",),
    ),
    # -- data sets ---------------------------------------------------------------------------------
    Mutant(
        "merged variance forgets the gap between means",
        "squares = one.squares + two.squares + gap**2 * (one.count[:, None] * share)",
        "squares = one.squares + two.squares",
        ("dataset_statistics",),
    ),
    Mutant(
        "ties among the largest go by arrival",
        'by_number = np.argsort(samples, axis=1, kind="stable")',
        "by_number = np.broadcast_to(np.arange(samples.shape[1]), samples.shape)",
        ("dataset_statistics",),
    ),
    Mutant(
        "a batch with one bad sample is skipped",
        "                self._add([sample], collected)",
        "                collected.skip(sample, one_line(error))",
        ("dataset_run",),
    ),
    Mutant(
        "an archive that was cut off is taken for whole",
        "if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:",
        "if not tarfile.BLOCKSIZE:",
        ("dataset_sources",),
    ),
    Mutant(
        "a shard with a missing table counts as whole",
        "        except (OSError, pa.ArrowException):\n            return False",
        "        except (OSError, pa.ArrowException):\n            pass",
        ("dataset_run",),
    ),
    # -- capture and evaluation --------------------------------------------------------------------
    Mutant(
        "inputs called masks are inputs like others",
        'in ("mask", "masks")',
        'in ("mask",)',
        ("values_by_hand",),
    ),
    Mutant(
        "the original LRP moves denominators towards zero",
        "moved = denominator + by * torch.where(denominator < 0, -1.0, 1.0)",
        "moved = denominator + by * torch.where(denominator < 0, 1.0, -1.0)",
        ("original",),
    ),
    Mutant(
        "the rest is averaged with the one",
        "torch.where(chosen == 1, 1.0, -line / (neurons[axis] - 1))",
        "torch.where(chosen == 1, 1.0, -line / neurons[axis])",
        ("targets",),
    ),
    Mutant(
        "what a later removal wakes stays asleep",
        "if not woken.isdisjoint(family.picked):",
        "if not woken:",
        ("intervention",),
    ),
    Mutant(
        "another strictness continues an evaluation",
        "of.strict, of.fallback",
        "of.fallback",
        ("evaluation_resumed",),
    ),
    Mutant(
        "bound methods of two objects are one setting",
        '"method", [value.__func__, value.__self__]',
        '"method", [value.__func__]',
        ("evaluation_store",),
    ),
    # -- pairs, metrics, capture -------------------------------------------------------------------
    Mutant(
        "pairs by forward messages forget the message",
        "pairs[:, :, chosen] = upper.add_up(message * onward).permute(1, 2, 0)",
        "pairs[:, :, chosen] = upper.add_up(onward).permute(1, 2, 0)",
        ("joint_dense", "joint"),
    ),
    Mutant(
        "pairs are added up one channel further",
        "numbers % (size + 1), pairs)",
        "(numbers + 1) % (size + 1), pairs)",
        ("contraction", "joint_dense"),
    ),
    Mutant(
        "pairs of a matrix without its weights",
        "return passed if weight is None else passed.mul_(weight)",
        "return passed",
        ("contraction_between", "joint_dense"),
    ),
    Mutant(
        "tied ranks share the highest",
        "counts.cumsum(0).double() - (counts - 1).double() / 2",
        "counts.cumsum(0).double()",
        ("metrics", "evaluation"),
    ),
    Mutant(
        "a folded norm scales no bias",
        "bias = shift if bias is None else bias * scale + shift",
        "bias = shift if bias is None else bias + shift",
        ("capture", "composites_defaults"),
    ),
)


# -- making them ---------------------------------------------------------------------------------


def copied(into: Path) -> None:
    """The tree, without what is built or ignored."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache")
            shutil.copytree(source, into / name, ignore=ignored)
        elif source.exists():
            shutil.copy2(source, into / name)


def place_of(mutant: Mutant, library: Path) -> tuple[Path | None, str]:
    """The one file with the text of a mutant, or why there is none."""
    counts = {path: path.read_text().count(mutant.old) for path in sorted(library.rglob("*.py"))}
    found = [path for path, count in counts.items() if count]
    if not found:
        return None, "no longer applies: its text is gone"
    if len(found) > 1 or counts[found[0]] > 1:
        names = ", ".join(str(path.relative_to(library)) for path in found)
        return None, f"no longer applies: its text stands in more than one place ({names})"
    return found[0], ""


def noticed(tree: Path, tests: list[str], jobs: int) -> str | None:
    """The first test that fails, if any does."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    if jobs > 1:
        command += ["-n", str(jobs)]
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    failed = FIRST_FAILURE.search(run.stdout)
    if failed is None:
        raise SystemExit(f"pytest did not run:\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}")
    return failed.group(1)


def result_of(mutant: Mutant, tree: Path, targeted: bool, jobs: int) -> str:
    """What became of a mutant."""
    path, missing = place_of(mutant, tree / "src")
    if path is None:
        return missing
    before = path.read_text()
    path.write_text(before.replace(mutant.old, mutant.new))
    try:
        found = noticed(tree, [f"tests/test_{name}.py" for name in mutant.tests], jobs)
        if found is None and not targeted:
            found = noticed(tree, ["tests"], jobs)
    finally:
        path.write_text(before)
    return "SURVIVED" if found is None else f"noticed by {found}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="+", default=[""], help="words of their names")
    parser.add_argument("--targeted", action="store_true", help="only the tests named with each")
    parser.add_argument("--check", action="store_true", help="only whether every text is there")
    parser.add_argument("--jobs", type=int, default=1, help="how many tests at once")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if any(word in m.name for word in options.only)]
    results: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        copied(tree)
        for mutant in chosen:
            if options.check:
                result = place_of(mutant, tree / "src")[1] or "applies"
            else:
                result = result_of(mutant, tree, options.targeted, options.jobs)
            results.append(result)
            sys.stdout.write(f"{mutant.name:55} {result}\n")
            sys.stdout.flush()
    open_ = sum(not result.startswith(("noticed", "applies")) for result in results)
    sys.stdout.write(f"{len(results)} changes, {open_} not noticed or gone\n")
    return int(open_ > 0)


if __name__ == "__main__":
    raise SystemExit(main())
