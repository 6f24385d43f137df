"""`tracr`: the compiled transformers, their true edges, and how well they are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import nrm
from nrm.errors import InputError
from nrm_reproduce import programs, tracr


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    if not (shared / "tracr" / "hist.json").is_file():
        pytest.skip("the compiled transformers are not there")
    return shared


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_programs_compute_what_they_say(folder: Path, name: str) -> None:
    program = programs.read_program(folder, name)
    known = json.loads((folder / "tracr" / f"{name}.json").read_text())
    assert len(program.examples) == len(known["examples"]) == 30
    assert len(program.true) == len(known["edges"])
    assert program.true <= set(program.candidates)
    # what was derived from what is written and read agrees with what the compiler said
    within = {edge for edge in program.true_everywhere if edge in program.candidates}
    assert within == program.true
    numeric = name == "frac_prevs"
    for example, given in zip(program.examples, known["examples"], strict=True):
        with torch.no_grad():
            stream = program.model(example.ids)[0]
        for position, dimension in example.outputs:
            right = given["output"][position] if numeric else 1.0
            assert float(stream[position, dimension]) == pytest.approx(right, abs=1e-4)


def test_auroc() -> None:
    assert tracr.auroc([3, 2, 1], [True, False, False]) == 1
    assert tracr.auroc([3, 2, 1], [False, True, False]) == 0.5
    assert tracr.auroc([1, 1, 1], [True, False, False]) == 0.5
    assert tracr.auroc([1, 1], [True, True]) is None


def test_attribution_is_exact_where_all_is_linear(folder: Path) -> None:
    """What the output has of components directly: no gradient is needed."""
    program = programs.read_program(folder, "reverse")
    example, other = program.examples[:2]
    scores = tracr.by_attribution()(program, example, other)
    written, _ = tracr._patched(program.model, tracr.embedded(program, example), ())
    for sender in program.order:
        direct = sum(abs(float(written[sender][0, p, d])) for p, d in example.outputs)
        assert scores[sender, "output"] == pytest.approx(direct)
    # and relevance says the same of them
    by_relevance = tracr.by_relevance(nrm.composites.LocalLinear())(program, example, other)
    for sender in program.order:
        direct = scores[sender, "output"]
        assert by_relevance.get((sender, "output"), 0.0) == pytest.approx(direct, abs=1e-9)


def test_the_command_says_how_well_edges_are_told(folder: Path, tmp_path: Path, command) -> None:
    found = command("tracr", "--data", folder, "--out", tmp_path / "out", "--samples", 2)
    assert found.exit_code == 0, found.output
    table, reads = json.loads((tmp_path / "out" / "result.json").read_text())["tables"]
    lines = {(line[0], line[1]): line for line in table["lines"]}
    assert set(lines) == {(p, m) for p in programs.PROGRAMS for m in tracr.METHODS}
    assert lines["frac_prevs", "nrm, LocalLinear"][2] == 1
    assert all(line[6] == f"{n} of {n}" for line in reads["lines"] for n in line[6].split()[:1])
    assert lines["hist", "EAP, zero"][2] is None  # one pair alone
    for program in ("reverse", "sort"):
        mine, eap = lines[program, "nrm, LocalLinear"][2], lines[program, "EAP, zero"][2]
        assert mine >= eap > 0.5


@pytest.mark.parametrize(("name", "last"), [("sort", "a2"), ("reverse", "a3")])
def test_a_mean_embedding_shows_what_passes_queries_and_keys(
    folder: Path, name: str, last: str
) -> None:
    """All that the compiler made; derivatives, on flat steps, say nothing of some edges."""
    program = programs.read_program(folder, name)
    mine = tracr.by_relevance(None, tracr.mean_embedding)
    eap = tracr.by_attribution(tracr.mean_embedding)
    for example, other in (program.examples[:2], program.examples[2:4]):
        scores = mine(program, example, other)
        assert tracr._told(scores, program.candidates, program.true) == 1
        of_eap = eap(program, example, other)
        assert (tracr._told(of_eap, program.candidates, program.true) or 0) < 1
        # edges into the output add up to what it differs by
        body = tracr.Body(program.model)
        here = body(*tracr.embedded(program, example))[0]
        change = here - body(*tracr.mean_embedding(program, example, other))[0]
        total = sum(abs(float(change[place])) for place in example.outputs)
        assert scores[last, "output"] == pytest.approx(total)


def test_of_examples_without_an_output_nothing_is_read(folder: Path) -> None:
    said: list[str] = []
    assert not programs.read_program(folder, "frac_prevs").examples[0].outputs
    assert tracr.program_reads(folder, ["frac_prevs"], samples=1, say=said.append) == []
    assert "no example has an output" in said[-1]


@pytest.mark.parametrize("name", ["frac_prevs", "reverse", "sort"])
def test_by_what_attention_reads_is_what_the_compiler_made_it_read_by(
    folder: Path, name: str
) -> None:
    known = json.loads((folder / "tracr" / f"{name}.json").read_text())["edges"]
    true = {(programs._short(e["from"]), programs._short(e["to"])): e["through"] for e in known}
    found = tracr.program_reads(folder, [name], samples=3)
    into = {edge for edge in true if edge[1].startswith("a")}
    assert {(one.sender, one.receiver) for one in found} == into
    for one in found:
        assert [one.through] == true[one.sender, one.receiver]
        assert one.right == one.examples > 0
        q, k, v = one.relevance
        least = 1e-6 * (q + k + v)
        assert (q + k <= least) if one.through == "value" else (v <= least < q + k)
    # what attention reads, taken together, is what it reads as a whole
    program = programs.read_program(folder, name)
    example = program.examples[0]
    whole = tracr.by_relevance(None, tracr.mean_embedding)(program, example, example)
    apart = tracr.by_relevance(None, tracr.mean_embedding, True)(program, example, example)
    for (sender, receiver), size in whole.items():
        if not receiver.startswith("a"):
            assert apart[sender, receiver] == pytest.approx(size, rel=1e-6, abs=1e-9)
        else:
            split = sum(apart[sender, f"{receiver}.{way}"] for way in "qkv")
            assert split >= size * (1 - 1e-6) - 1e-9  # sizes of sums


def test_what_is_no_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no program 'hist' of tracr there"):
        programs.read_program(tmp_path, "hist")
