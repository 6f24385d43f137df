"""`circuits`: a Llama written out, patching, what others say, ablated edges, and the command."""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")

import nrm
from nrm.errors import InputError
from nrm_reproduce import attribution, circuits, ioi
from nrm_reproduce.command import KEPT
from nrm_reproduce.edge_ablation import (
    SHARES,
    Llama,
    Pairs,
    area,
    best,
    curve,
    distance,
    faithfulness,
)
from nrm_reproduce.report import PAGE, RESULT

LAYERS, HEADS = 2, 4
NEARLY: Any = {"rtol": 1e-4, "atol": 1e-5}
"""Llama's norms compute in single precision."""


def imported() -> Any:
    from nrm.torchvision_mismatch import import_torchvision

    with warnings.catch_warnings(), suppress(ModuleNotFoundError):
        warnings.filterwarnings("ignore", "torchvision's compiled operators", RuntimeWarning)
        import_torchvision()
    import transformers

    return transformers


def words() -> list[str]:
    """All that the templates may hold, split at blanks."""
    found = ["<pad>", "<s>", "</s>", "<unk>", *ioi.NAMES, *ioi.OBJECTS]
    for place in ioi.PLACES:
        found += [place, f"{place},", f"{place}."]
    for template in ioi.TEMPLATES:
        found += [word for word in template.split() if "{" not in word]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped keys, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    transformers = imported()
    torch.manual_seed(0)
    vocabulary = {word: place for place, word in enumerate(words())}
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, vocab_size=len(vocabulary), initializer_range=0.4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    place = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    fast.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    from nrm.cli import tokens

    found = tokens.load(folder, torch.device("cpu"))
    found.model.requires_grad_(False).double()
    return found


@pytest.fixture(scope="module")
def network(loaded: Any) -> Llama:
    return Llama(loaded.model)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 30, (2, 6), generator=drawn)
    others = ids.clone()
    others[:, 2], others[0, 4] = 31, 32
    return Pairs(ids, others, torch.tensor([5, 6]), torch.tensor([7, 8]))


# -- a Llama written out ---------------------------------------------------------------------------


def test_it_computes_what_the_model_does(loaded: Any, network: Llama, pairs: Pairs) -> None:
    run = network.run(pairs.ids, pairs.right, pairs.wrong)
    logits = loaded.model(pairs.ids).logits[:, -1]
    wanted = logits.gather(1, pairs.right[:, None]) - logits.gather(1, pairs.wrong[:, None])
    torch.testing.assert_close(run.output, wanted[:, 0], **NEARLY)
    torch.testing.assert_close(run.senders.sum(1), run.streams[-1])
    relp = Llama(loaded.model, relp=True).run(pairs.ids, pairs.right, pairs.wrong)
    torch.testing.assert_close(relp.output, run.output)


def test_edges_are_from_what_is_computed_before(network: Llama) -> None:
    there = {
        (network.senders[s], network.receivers[r]) for r, s in network.edges.nonzero().tolist()
    }
    assert ("embed", "a0.h0") in there
    assert ("a0.h3", "m0") in there
    assert ("m0", "a1.h0") in there
    assert ("m1", "output") in there
    assert ("a0.h0", "a0.h1") not in there
    assert ("m0", "m0") not in there
    assert ("m0", "a0.h0") not in there
    each = HEADS + 1  # senders of a layer
    wanted = sum(HEADS * (1 + k * each) + 1 + k * each + HEADS for k in range(LAYERS))
    assert len(there) == wanted + 1 + LAYERS * each


def test_all_edges_are_the_model_and_none_the_counterfactual(network: Llama, pairs: Pairs) -> None:
    here = network.run(pairs.ids, pairs.right, pairs.wrong)
    there = network.run(pairs.others, pairs.right, pairs.wrong)
    kept = torch.stack([network.edges, torch.zeros_like(network.edges)]).unsqueeze(1)
    found = network.ablated(pairs, kept, here, there)
    torch.testing.assert_close(found, torch.stack([here.output, there.output]))


def test_edges_into_the_output_alone_are_linear_but_for_the_norm(
    network: Llama, pairs: Pairs
) -> None:
    """And one edge brings what its sender, which reads the counterfactual, does not change."""
    here, there = network.run(pairs.ids), network.run(pairs.others)
    only = torch.zeros_like(network.edges)
    only[-1, 0] = True  # embed -> output
    stream = there.streams[-1] + here.senders[:, 0] - there.senders[:, 0]
    wanted = network.told(stream, pairs.right, pairs.wrong)
    torch.testing.assert_close(network.ablated(pairs, only[None, None], here, there)[0], wanted)
    only[-1, 0], only[-1, 3] = False, True  # a head that reads nothing new writes nothing new
    wanted = network.told(there.streams[-1], pairs.right, pairs.wrong)
    torch.testing.assert_close(network.ablated(pairs, only[None, None], here, there)[0], wanted)


def test_a_path_of_edges_is_what_hooks_would_do(network: Llama, pairs: Pairs) -> None:
    """embed -> m0 -> a1.h2 -> output, step by step."""
    here, there = network.run(pairs.ids), network.run(pairs.others)
    kept = torch.zeros_like(network.edges)
    for sender, receiver in (("embed", "m0"), ("m0", "a1.h2"), ("a1.h2", "output")):
        kept[network.receivers.index(receiver), network.senders.index(sender)] = True
    change = here.senders[:, 0] - there.senders[:, 0]
    mlp = network.mlp(0, there.streams[1] + change)
    change = mlp - there.senders[:, network.senders.index("m0")]
    heads = network.written(1, network.attended(1, (there.streams[2] + change).unsqueeze(1)))
    change = heads[:, 2] - there.senders[:, network.senders.index("a1.h2")]
    wanted = network.told(there.streams[-1] + change, pairs.right, pairs.wrong)
    torch.testing.assert_close(network.ablated(pairs, kept[None, None], here, there)[0], wanted)


def test_another_model_is_refused(loaded: Any) -> None:
    with pytest.raises(InputError, match="Llama-like"):
        Llama(torch.nn.Linear(2, 2))
    transformers = imported()
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)
    with pytest.raises(InputError, match="GPT2LMHeadModel is none"):
        Llama(transformers.GPT2LMHeadModel(config))


# -- curves ----------------------------------------------------------------------------------------


def test_the_best_edges_are_those_with_the_highest_scores() -> None:
    edges = torch.tensor([[True, True, False], [True, True, True]])
    scores = torch.tensor([[0.1, -0.9, 7.0], [0.4, 0.0, 0.3]])
    chosen = best(scores, edges, 0.4)
    assert chosen.nonzero().tolist() == [[1, 0], [1, 2]]
    assert best(scores, edges, 0.4, by_size=True).nonzero().tolist() == [[0, 1], [1, 0]]
    both = best(torch.stack([scores, -scores]), edges, 0.2)
    assert both.nonzero().tolist() == [[0, 1, 0], [1, 0, 1]]
    assert bool((best(scores, edges, 1.0) == edges).all())


def test_a_perfect_order_has_a_larger_area_than_chance(network: Llama, pairs: Pairs) -> None:
    """Edges by what they bring alone, into the output of a circuit that is nothing else."""
    here = network.run(pairs.ids, pairs.right, pairs.wrong)
    there = network.run(pairs.others, pairs.right, pairs.wrong)
    # for the output's own edges all orders can be tried: how much is lost without each
    scores = attribution.by_edge(network, network, pairs)["EAP"]
    exact = torch.zeros_like(scores)
    for receiver, sender in network.edges.nonzero().tolist():
        kept = network.edges.clone()
        kept[receiver, sender] = False
        without = network.ablated(pairs, kept[None, None], here, there)[0]
        exact[:, receiver, sender] = here.output - without
    drawn = torch.Generator().manual_seed(0)
    chance = torch.rand(exact.shape, generator=drawn, dtype=exact.dtype)
    # prompts whose answer the circuit is to raise
    sign = (here.output - there.output).sign()[:, None, None]

    def cpr(values: torch.Tensor) -> float:
        outputs = curve(network, pairs, values * sign)
        signed = [sign[:, 0, 0] * x for x in (outputs, here.output, there.output)]
        return float(area(faithfulness(*signed)))

    assert cpr(exact) > cpr(chance)


def test_areas() -> None:
    flat = torch.ones(len(SHARES), dtype=torch.float64)
    assert float(area(flat)) == pytest.approx(SHARES[-1] - SHARES[0])
    assert float(distance(flat)) == 0
    assert float(distance(1 + flat)) == pytest.approx(float(area(flat)))
    outputs = torch.tensor([[1.0, 3.0], [2.0, 4.0]])
    whole, none = torch.tensor([2.0, 4.0]), torch.tensor([0.0, 2.0])
    assert faithfulness(outputs, whole, none).tolist() == [0.5, 1.0]


def test_circuits_in_steps_are_those_at_once(network: Llama, pairs: Pairs) -> None:
    scores = attribution.by_edge(network, network, pairs)["EAP"]
    torch.testing.assert_close(
        curve(network, pairs, scores, memory=1), curve(network, pairs, scores)
    )
    one = curve(network, pairs, scores.mean(0))
    torch.testing.assert_close(one, curve(network, pairs, scores.mean(0).expand(2, -1, -1)))


def test_circuits_for_the_other_half_are_chosen_on_other_prompts(
    network: Llama, pairs: Pairs
) -> None:
    first = ioi.halves(7, seed=3)
    assert first.tolist() == ioi.halves(7, seed=3).tolist() != ioi.halves(7, seed=4).tolist()
    assert int(first.sum()) == 3
    scores = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))
    found = ioi._chosen_by(scores, ioi.HALF, first)
    for row in range(7):
        others = [k for k in range(7) if bool(first[k]) != bool(first[row])]
        torch.testing.assert_close(found[row], scores[others].mean(0))
        changed = scores.clone()
        changed[first == first[row]] += 1  # its own half has no say
        assert torch.equal(ioi._chosen_by(changed, ioi.HALF, first)[row], found[row])
    torch.testing.assert_close(ioi._chosen_by(scores, ioi.TASK, first)[4], scores.mean(0))
    assert ioi._chosen_by(scores, ioi.PROMPT, first) is scores
    # circuits of one prompt are those of the other's scores
    of_each = attribution.by_edge(network, network, pairs)["EAP"]
    swapped = ioi._chosen_by(of_each, ioi.HALF, torch.tensor([True, False]))
    torch.testing.assert_close(
        curve(network, pairs, swapped), curve(network, pairs, of_each.flip(0))
    )


# -- patching and what estimates it ----------------------------------------------------------------


def test_patching_is_what_hooks_do(loaded: Any, network: Llama, pairs: Pairs) -> None:
    truth = attribution.patched(network, pairs)
    in_steps = attribution.patched(network, pairs, memory=1)
    torch.testing.assert_close(in_steps, truth)
    modules = [
        [f"model.layers.{k}", f"model.layers.{k}.self_attn.o_proj", f"model.layers.{k}.mlp"]
        for k in range(LAYERS)
    ]
    row, place = 0, 4

    def output(ids: torch.Tensor, change: Any = None, where: str | None = None) -> float:
        handle = None
        if where is not None:
            handle = loaded.model.get_submodule(where).register_forward_hook(change)
        logits = loaded.model(ids).logits[0, -1]
        if handle is not None:
            handle.remove()
        return float(logits[pairs.right[row]] - logits[pairs.wrong[row]])

    plain = output(pairs.ids[row : row + 1])
    for layer, parts in enumerate(modules):
        for part, name in enumerate(parts):
            seen = []

            def see(module: Any, given: Any, out: Any, seen: list[Any] = seen) -> None:
                seen.append(out[0] if isinstance(out, tuple) else out)

            output(pairs.others[row : row + 1], see, name)

            def patch(module: Any, given: Any, out: Any, seen: list[Any] = seen) -> Any:
                first = (out[0] if isinstance(out, tuple) else out).clone()
                first[:, place] = seen[0][:, place]
                return (first, *out[1:]) if isinstance(out, tuple) else first

            lost = plain - output(pairs.ids[row : row + 1], patch, name)
            assert float(truth[row, part, layer, place]) == pytest.approx(lost, abs=1e-5)
    assert not bool(truth[:, :, :, :2].any())  # nothing differs there


def test_estimates_are_right_to_first_order(loaded: Any, network: Llama, pairs: Pairs) -> None:
    """Derivatives: for embeddings close by, what moves along them is the change of the output."""
    found = attribution.slopes(network, pairs)
    here, there = network.embedded(pairs.ids), network.embedded(pairs.others)
    step = 1e-6
    moved = network.run(pairs.ids, pairs.right, pairs.wrong, here + step * (there - here))
    change = (moved.output - network.run(pairs.ids, pairs.right, pairs.wrong).output) / step
    along = ((there - here) * found.senders[:, 0]).sum((1, 2))
    torch.testing.assert_close(along, change, rtol=1e-4, atol=1e-6)
    # what all receivers of a sender make of it is what it makes of the output
    into = torch.einsum("rs,nrtd->nstd", network.edges.double(), found.receivers)
    torch.testing.assert_close(into, found.senders)


def test_relevance_has_the_total_and_the_streams(loaded: Any, network: Llama, pairs: Pairs) -> None:
    relevance = ioi.Relevance(loaded.model, network)
    here = network.run(pairs.ids, pairs.right, pairs.wrong).output
    there = network.run(pairs.others, pairs.right, pairs.wrong).output
    found = relevance.by_component(pairs)
    streams = found[ioi.REFERENCE][:, 0].sum(-1)  # of each layer
    torch.testing.assert_close(streams, (here - there)[:, None].expand(-1, LAYERS), **NEARLY)
    edges = relevance.by_edge(pairs, 2**28)
    assert set(edges) < set(relevance.explainers)
    into_output = edges[ioi.REFERENCE][:, -1].sum(-1)
    torch.testing.assert_close(into_output, here - there, **NEARLY)
    assert not any(bool(e[:, ~network.edges].any()) for e in edges.values())


def test_all_methods_are_right_where_all_is_linear(pairs: Pairs) -> None:
    """The last stream but for its norm: relevance says what patching finds."""
    truth = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    assert ioi.pearson(ioi.moments(truth * 2 + 1, truth).numpy()) == pytest.approx(1)
    assert ioi.pearson(ioi.moments(-truth, truth).numpy()) == pytest.approx(-1)
    some = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1))
    wanted = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(some, truth, strict=True)]
    np.testing.assert_allclose(ioi.pearson(ioi.moments(some, truth).numpy()), wanted, rtol=1e-6)
    assert ioi.pearson(ioi.moments(0 * truth, truth).numpy()).tolist() == [0, 0, 0]


def test_a_linear_model_is_patched_as_relevance_says() -> None:
    """Differences are exact where all above a part is linear in it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))).double().eval()
    x, other = torch.randn(2, 1, 4, dtype=torch.float64)
    R = nrm.Explainer(model)(x, target=1, reference=other)
    scores, truth = [], []
    for name in ("0", "1"):
        scores.append(R.marginal(name)[0] * R.scale)
        below, above = model[: int(name) + 1], model[int(name) + 1 :]
        here, there = below(x), below(other)
        patched = here.repeat(4, 1)
        patched[range(4), range(4)] = there[0]
        truth.append((above(here) - above(patched))[:, 1])
    found = ioi.moments(torch.stack(scores), torch.stack(truth).detach())
    assert ioi.pearson(found.detach().numpy()) == pytest.approx(1)


# -- prompts ---------------------------------------------------------------------------------------


def test_prompts_have_counterfactuals_of_both_kinds(loaded: Any) -> None:
    found = ioi.prompts(loaded.tokenizer, 24)
    assert found == ioi.prompts(loaded.tokenizer, 24) != ioi.prompts(loaded.tokenizer, 24, seed=1)
    for prompt in found:
        assert len(prompt.ids) == len(prompt.others)
        a, b = (prompt.text.split(), prompt.other.split())
        changed = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
        assert len(changed) == (3 if prompt.kind == ioi.OTHERS else 1)
        subject = loaded.tokenizer.decode([prompt.wrong])
        assert a.count(subject) == 2
        assert a.count(loaded.tokenizer.decode([prompt.right])) == 1
        assert changed[-1][0] == subject
    assert {prompt.kind for prompt in found} == set(ioi.KINDS)


def test_a_tokenizer_without_names_is_refused() -> None:
    class Letters:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return list(range(len(text)))

    with pytest.raises(InputError, match="0 of the names"):
        ioi.prompts(Letters())


# -- the command -----------------------------------------------------------------------------------


def test_the_command_makes_the_page(
    folder: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ioi, "RESAMPLES", 40)
    out = tmp_path / "out"
    found = command("circuits", "--model", folder, "--out", out, "--samples", 8)
    assert found.exit_code == 0, found.output
    assert (out / PAGE).is_file()
    assert {"curves.png", "circuit.png"} <= {file.name for file in out.iterdir()}
    result = json.loads((out / RESULT).read_text())
    assert result["facts"]["prompts"] == 8
    assert "tracr" in result["facts"]["skipped: compiled transformers"]
    figures = result["details"]["ioi"]
    for title in ("all prompts", *ioi.KINDS):
        rows = figures[f"correlations, {title}"]
        methods = {row["method"] for row in rows}
        assert len(rows) == len(attribution.PARTS) * len(methods)
        assert {ioi.REFERENCE, "attribution patching", "RelP coefficients"} < methods
        for row in rows:
            for name in ("pooled", "by_prompt"):
                assert -1 <= row[name]["low"] <= row[name]["high"] <= 1
            assert (row["pooled"]["less"] == 0) >= (row["method"] == ioi.REFERENCE)
    for kind in ioi.KINDS:
        rows = figures[f"circuits, {kind}"]
        methods = {row["method"] for row in rows}
        assert {ioi.REFERENCE, "EAP", ioi.RANDOM} < methods
        assert len(rows) == 6 * len(methods)  # by whose scores, and ranked by what
        assert {row["circuits"] for row in rows} == {ioi.TASK, ioi.HALF, ioi.PROMPT}
        for row in rows:
            assert len(row["faithfulness"]) == len(SHARES)
            assert row["faithfulness"][-1] == pytest.approx(1, abs=1e-3)  # all edges
            assert row["CPR"]["value"] == pytest.approx(
                np.trapezoid(row["faithfulness"], SHARES), rel=1e-6
            )
    # what was kept is read again, and nothing is explained anew
    (out / KEPT).rename(tmp_path / KEPT)
    (tmp_path / "again").mkdir()
    (tmp_path / KEPT).rename(tmp_path / "again" / KEPT)
    monkeypatch.setattr(ioi.Relevance, "measure", None)
    again = command("circuits", "--model", folder, "--out", tmp_path / "again", "--samples", 8)
    assert again.exit_code == 0, again.output
    other = json.loads((tmp_path / "again" / RESULT).read_text())
    assert other["details"] == result["details"]


def test_nothing_to_run_on_is_refused(tmp_path: Path, command: Any) -> None:
    found = command("circuits", "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert "no --model is named" in found.output
    found = command("tracr", "--model", tmp_path, "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert "--model: tracr takes none" in found.output


def test_top_edges_are_drawn_as_circuits_are() -> None:
    edges = circuits.TopEdges(0.5, ("embed", "m0"), {("m0", "output"): 1.0, ("embed", "m0"): -0.5})
    assert len(edges) == 2
    assert edges.score(*edges.edges[0]) == 1
    some = [("embed", "m0"), ("m0", "output"), ("m0", "m1"), ("a0.h1", "output")]
    assert circuits.on_ways(some) == set(some[:2])
    assert circuits.on_ways(some[1:]) == set()
