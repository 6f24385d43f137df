"""From a model to its measures: capture once, explain many inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from nrm.build import build_graph
from nrm.capture.cache import opened
from nrm.capture.call import ModelCall, Output, check_nested, is_copy, wide, without_autocast
from nrm.capture.digest import contents, refuse_changed
from nrm.capture.export import capture, reproduces
from nrm.capture.nodes import Captured, is_mask
from nrm.capture.store import Captures, Entry, perturbed
from nrm.capture.tracing import capturing
from nrm.capture.witness import State, state_of, written
from nrm.composites import Composite, Everywhere, LRPZero, hint_for, suggested
from nrm.differences import reference_of
from nrm.display import Shown, Table
from nrm.errors import InputError, TargetError
from nrm.explanation import Recipe, Target, explain_relevance, explain_target
from nrm.graph import Graph
from nrm.heads import Heads
from nrm.measure import Measure
from nrm.operators import Operator
from nrm.prepare import Program
from nrm.rules import Rule
from nrm.targets import Combination
from nrm.tensors import check_dense, not_finite
from nrm.views import Listing, settings_table

Check = Literal["model", "output", "none"]
"""How it is noticed that a model changed after it was captured."""


class Explainer(Shown):
    """Explains a PyTorch model by the normalized relevance measure.

    The model is captured at the first call and the capture is used again for inputs of the same
    shape, in batches of any size, and of sequences of token ids `[batch, length]` at other lengths
    too (`nrm.capture.lengths`). The model is never changed. When anything that lies in it was
    (the contents of its tensors, however written; hooks, forwards, attributes of modules and of
    their classes), it is captured again. Several threads may use one explainer.

    A model in float16 or bfloat16 takes inputs as ever and is answered in float32, from a copy of
    its weights that takes twice their memory.

    Arguments:
        model: in evaluation mode.
        composite: which rule applies where, or one rule for all. By default
            `composites.GammaFlat(0.25)`, and `composites.CPLRP()` for networks with embeddings,
            normalisation layers or recurrent layers (`composites.suggested`).
        bias: `"drop"`: biases neither emit nor take relevance, and contributions are normalised
            without them. `"input"`: each is a late input neuron of value one, at which walks end.
            By default what the composite assumes.
        strict: refuse to send relevance through a column that violates a positive-sum condition
            (eqs. 15, 16).
        output: which output is explained, where the model returns several: a name (`"logits"`),
            an index, a path of them (`("hidden_states", -1)`), or a function of what the model
            returns that gives a tensor.
        batch_axis: where the samples lie in every input; `None`: all of a call is one sample, as
            for a graph. By default 0, or `None` where the inputs' first axes differ.
        fallback: the row of operators that have none, e.g. `operators.LocalLinear()`; by default
            they are refused.
        head: `"logits"`: a last softmax, log-softmax, sigmoid or log-sigmoid is looked through,
            and the logit behind it explained (`Measure.explained` says so); `"keep"`: the model's
            output as it is, whose sign is not the logit's (`nrm.heads`).
        check: how a change of the model is noticed. `"model"`: everything that lies in it is looked
            at in every call, its tensors whole. `"output"`: its own output for this very input is
            compared as well (two more forward passes), which sees what no look at the model can (a
            global variable that its code reads). `"none"`: it is trusted not to change, until
            `refresh()`.

    Example:
        >>> R = Explainer(model)(image, target=3)
        >>> R.heatmap(), R(nrm.channels("features.28", 12))
        >>> R = Explainer(gpt2, output="logits")(input_ids=ids, target=(-1, token))
        >>> R.tokens()
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | Rule | None = None,
        *,
        bias: Literal["drop", "input"] | None = None,
        strict: bool = False,
        output: Output = None,
        batch_axis: int | Literal["auto"] | None = "auto",
        fallback: Operator | None = None,
        head: Heads = "logits",
        check: Check = "model",
    ) -> None:
        _check_options(bias, strict, output, batch_axis, fallback)
        if head not in ("logits", "keep"):
            raise ValueError(f"head is 'logits' or 'keep', not {head!r}")
        if check not in ("model", "output", "none"):
            raise ValueError(f"check is 'model', 'output' or 'none', not {check!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
        self.model = model
        if isinstance(composite, Rule):
            composite = Everywhere(composite)
        if not isinstance(composite, Composite | None):
            raise TypeError(
                f"the composite must be a nrm.composites.Composite or a rule, not {composite!r}."
                f"{hint_for(composite)}"
            )
        self.composite = composite
        self.bias = bias
        self.strict = strict
        self.output = output
        self.batch_axis = batch_axis
        self.fallback = fallback
        self.head = head
        self.check = check
        self._captures = Captures()

    def __call__(
        self,
        *inputs: Any,
        target: Target = None,
        output_relevance: Tensor | None = None,
        reference: Any = None,
        **named: Any,
    ) -> Measure:
        """The measure of a batch of inputs.

        Arguments:
            inputs, named: the model's arguments. Real-valued tensors are leaves, where walks end;
                of integer inputs, their embeddings are. Masks (`mask`, `..._mask`) carry none.
            target: the output neuron to explain: one for all samples or one for each, ints for an
                output `[batch, C]`, tuples for more axes (`(position, token)`, where negative
                numbers count from the end); or a combination of outputs (`nrm.Contrast(3, 5)`,
                `nrm.AgainstRest(3)`, `nrm.Average(...)`). By default each sample's largest output.
            output_relevance: instead of a target, the unnormalised relevance of all outputs,
                shaped like the output (eq. 13): `f(x)` itself, a softmax, a difference of logits.
                Where a head is looked through, it is that of the logits, one to one.
            reference: another input x', from which differences are taken: contributions are
                `w_ij (a_i - a'_i)`, `R.scale` is `f(x) - f(x')`, and a share times that is what of
                the difference passes there (docs/references.md). A tensor of the input's shape, or
                of one sample for all, or a number; for a model with several inputs a mapping from
                their names, where those left out are the same in both. Biases contribute nothing.
                The composite's rules apply to weighted sums, by default LRP-0; products, norms and
                softmax go by their own slopes.

        Raises:
            InputError, TargetError, CaptureError, UnsupportedOperatorError, PositiveSumError
        """
        with torch.inference_mode(False), without_autocast(self.model):
            call = self._bind(inputs, named)
            program, unchanged = self._program(call, reference is not None)
            before = None
            if reference is not None:
                before = reference_of(call, reference, self._batch_axis(call))
                reference = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), reference)
                captured = program.graph.captured
                other = ModelCall(self.model, *call.arguments(*before), self.output)
                if not captured.reusable and not reproduces(captured, other):
                    raise InputError(
                        f"{type(self.model).__name__} does something else at the reference than at "
                        "the input (its Python code branches on values), so that there are no two "
                        "runs of one network to compare."
                    )
                before = [wide(x) for x in before]
            forward = program.run([wide(x) for x in call.tensors], unchanged, before)
            if not bool(torch.isfinite(forward.returned).all()):
                self._refuse_not_finite()
            if isinstance(output_relevance, Tensor):
                output_relevance = wide(output_relevance).detach().clone()  # callers reuse theirs
            if output_relevance is None:
                explained = explain_target(target, forward, self.strict)
            elif target is None:
                explained = explain_relevance(output_relevance, forward, self.strict)
            else:
                raise TargetError("give either a target or an output_relevance, not both")
            inputs, named = call.arguments(*call.tensors)
            chosen = target if isinstance(target, Combination) else explained.target
            recipe = Recipe(self, inputs, named, chosen, output_relevance, reference)
            return Measure(forward, explained, recipe, self.strict)

    def _refuse_not_finite(self) -> None:
        """Say which of the model's weights is at fault for an output that is not finite."""
        held = not_finite(self.model)
        if held is not None:
            raise TargetError(f"the model's output holds NaN or infinite values: {held}.")

    def table(self) -> Table:
        return settings_table(self.__getstate__())

    def layers(self, *inputs: Any, **named: Any) -> Listing:
        """Every addressable variable: its name, operator, shape, channels, and whether a cut.

        Arguments and errors: the model's, as for a call; nothing is explained.
        """
        return Listing(self.graph(*inputs, **named))

    def graph(self, *inputs: Any, **named: Any) -> Graph:
        """The graph that these inputs are explained on.

        Arguments and errors: the model's, as for a call; nothing is explained.
        """
        with torch.inference_mode(False), without_autocast(self.model):
            return self._program(self._bind(inputs, named))[0].graph

    def samples(self, *inputs: Any, **named: Any) -> int:
        """How many samples a call with these inputs explains; nothing is captured."""
        call = self._bind(inputs, named)
        axis = self._batch_axis(call)
        return 1 if axis is None else call.tensors[0].shape[axis]

    def refresh(self) -> None:
        """Forget the captured model, so that the next call captures it as it is then."""
        self._captures.forget()

    def __repr__(self) -> str:
        chosen = {
            "bias": self.bias,
            "strict": self.strict or None,
            "output": self.output,
            "batch_axis": None if self.batch_axis == "auto" else self.batch_axis,
            "fallback": self.fallback,
            "head": None if self.head == "logits" else self.head,
            "check": None if self.check == "model" else self.check,
        }
        options = [f"{name}={value!r}" for name, value in chosen.items() if value is not None]
        if self.batch_axis is None:
            options.append("batch_axis=None")
        composite = "suggested composite" if self.composite is None else repr(self.composite)
        kept = len(self._captures)
        captures = f"{kept} capture{'' if kept == 1 else 's'}"
        what = ", ".join([type(self.model).__name__, composite, *options])
        return f"Explainer({what}; {captures})"

    # Pickled and copied without its captures, which are made anew where it is used next. A copy
    # shares the model, a deep copy has its own.

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Explainer.__init__(self, state["model"])
        vars(self).update(state)

    def _bind(self, inputs: Sequence[Any], named: dict[str, Any]) -> ModelCall:
        _check_model(self.model)
        inputs, named = opened((tuple(inputs), named))
        check_nested(inputs, named)
        # Copies, because a measure reads its inputs when it is asked, and callers reuse theirs.
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (inputs, named))
        call = ModelCall(self.model, args, kwargs, self.output)
        _check_inputs(call, self.model)
        return call

    def _program(
        self, call: ModelCall, differences: bool = False
    ) -> tuple[Program, Callable[[], None]]:
        """The program for a call, and a check that what it reads is still the same.

        Arguments:
            differences: walks are those of the differences from a reference.
        """
        along = self._batch_axis(call)
        samples = 1 if along is None else call.tensors[0].shape[along]
        state = None if self.check == "none" else state_of(self.model)
        self._captures.meet(state)
        known = partial(self._known, call, along, samples, differences)
        entry = known()
        if entry is None:
            with capturing():  # another thread may have captured it meanwhile
                entry = known() or self._new(call, along, samples, differences)
        if along is not None and samples > 1 and not entry.apart:
            _check_samples_are_apart(call, along, entry.program.graph.captured)
            entry.apart = True
        if state is None:
            return entry.program, lambda: None
        constants = entry.program.graph.captured.constants
        read = [t for node, t in constants.items() if not is_copy(node)]
        if len(read) < len(constants):  # copies of what is in half precision
            tensors = (*self.model.parameters(), *self.model.buffers())
            read += [t for t in tensors if wide(t) is not t]
        return entry.program, partial(refuse_changed, read, state.digests(read))

    def _known(
        self, call: ModelCall, along: int | None, samples: int, differences: bool
    ) -> Entry | None:
        """What was captured before, if it still is the model."""
        any_batch = (differences, *_signature(call, along))
        for key in ((samples, *any_batch), any_batch):
            entry = self._captures.find(key)
            if entry is None:
                continue
            if self.check != "none" and not entry.is_unchanged():
                self._captures.drop(key)
                continue
            wary = self.check == "output" or self._captures.written
            if samples in entry.sizes and not wary:
                return entry
            # Python code may have branched on the batch size: compare once for every size.
            if reproduces(entry.program.graph.captured, call):
                entry.sizes.add(samples)
                return entry
            if samples in entry.sizes:  # it was the model once
                self._captures.drop(key)
        return None

    def _new(self, call: ModelCall, along: int | None, samples: int, differences: bool) -> Entry:
        any_batch = (differences, *_signature(call, along))
        this_batch = (samples, *any_batch)
        exports = not self._captures.is_refused(this_batch)
        shared = self._captures.shared
        captured = self._captured(samples, differences, call, along)
        captured = captured or capture(call, along, exports, shared)
        if not captured.batched and samples > 1:
            self._refuse_without_axis(captured, along, samples)
        composite = self.composite or (LRPZero() if differences else suggested(captured))
        bias = self.bias or composite.bias
        graph = build_graph(
            captured, composite, bias == "input", self.fallback, self.head, differences
        )
        own: list[Tensor] = []
        if self.check != "none":
            state = self._witnessed(call)
            own = [t for t in captured.constants.values() if not state.holds(t)]
        entry = Entry(Program(graph, self.strict, shared), own, contents(own), {samples})
        if not captured.reusable:
            self._captures.refuse(this_batch)
        else:
            only_here = not captured.batched or self._captures.find(any_batch) is not None
            self._captures.keep(this_batch if only_here else any_batch, entry)
        return entry

    def _captured(
        self, samples: int, differences: bool, call: ModelCall, along: int | None
    ) -> Captured | None:
        """What was captured already for walks of the other kind, if it still is the model."""
        any_batch = (not differences, *_signature(call, along))
        for key in ((samples, *any_batch), any_batch):
            entry = self._captures.find(key)
            if entry is not None and samples in entry.sizes and entry.is_unchanged():
                found: Captured = entry.program.graph.captured
                return found
        return None

    def _refuse_without_axis(self, captured: Captured, along: int | None, samples: int) -> None:
        """Refuse a graph for one batch alone whose output has no axis for the samples."""
        shape = captured.output.meta["val"].shape
        if along is None or len(shape) <= along or shape[along] != samples:
            raise InputError(
                f"{type(self.model).__name__} can only be captured for one batch at a time (its "
                "Python code branches on values, or fixes the batch size), and its output "
                f"{tuple(shape)} does not keep the {samples} samples apart. Explain one sample "
                "at a time, with a batch axis in front (x[None]); or, if all of the call is one "
                "sample (a graph, a sequence), say Explainer(..., batch_axis=None)."
            )

    def _witnessed(self, call: ModelCall) -> State:
        """The model as it is now, with a note of what it writes into itself when it runs."""
        states = [state_of(self.model)]
        for tensors in (perturbed(call.tensors), call.tensors):
            with torch.no_grad(), suppress(Exception):  # it need not take other inputs
                call.forward(*tensors)
            states.append(state_of(self.model))
            if not states[-2].changes(states[-1]):
                break
        self._captures.note(states[-1], written(states))
        return states[-1]

    def _batch_axis(self, call: ModelCall) -> int | None:
        """Where the batch lies in every input.

        Raises:
            InputError: the inputs do not have the same number of samples there.
        """
        sizes = {x.shape[0] if x.dim() else 1 for x in call.tensors}
        if self.batch_axis == "auto":
            return 0 if len(sizes) == 1 else None
        axis = self.batch_axis
        if axis is None:
            return None
        for name, x in zip(call.names, call.tensors, strict=True):
            if x.dim() <= axis or x.shape[axis] != call.tensors[0].shape[axis]:
                raise InputError(
                    f"input {name!r} {tuple(x.shape)} does not hold as many samples along axis "
                    f"{axis} as {call.names[0]!r} {tuple(call.tensors[0].shape)}"
                )
        return axis


def _check_options(bias: Any, strict: Any, output: Any, batch_axis: Any, fallback: Any) -> None:
    """Refuse what no explainer could do as told.

    Raises:
        TypeError, ValueError: saying what the option may be.
    """
    if bias is not None and not (isinstance(bias, str) and bias in ("drop", "input")):
        raise ValueError(f"bias is 'drop' or 'input', not {bias!r}")
    if not isinstance(strict, bool):
        raise TypeError(f"strict is True or False, not {strict!r}")
    if not _chooses(output):
        raise TypeError(
            "output is a name, an index, a path of these, or a function of what the model "
            f"returns, not {output!r}"
        )
    named = isinstance(batch_axis, str) and batch_axis == "auto"
    if batch_axis is not None and not named and not _is_index(batch_axis):
        raise TypeError(f"batch_axis is an axis, None or 'auto', not {batch_axis!r}")
    if _is_index(batch_axis) and batch_axis < 0:
        raise ValueError(f"batch_axis is counted from the front, 0 or more, not {batch_axis!r}")
    if fallback is not None and not isinstance(fallback, Operator):
        raise TypeError(
            "fallback is a row for operators that have none, such as "
            f"nrm.operators.LocalLinear(), not {fallback!r}"
        )


def _is_index(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)


def _chooses(output: Any) -> bool:
    """Whether something says which output is meant."""
    if output is None or callable(output) or isinstance(output, str) or _is_index(output):
        return True
    if not isinstance(output, Sequence) or not output:
        return False
    return all(isinstance(step, str) or _is_index(step) for step in output)


def _check_samples_are_apart(call: ModelCall, axis: int, captured: Captured) -> None:
    """Refuse a batch whose samples depend on each other: its axis is something else.

    Arguments:
        captured: the model, which says how precisely it computes.

    Raises:
        InputError: some samples' output is another beside other samples.
    """
    size = call.tensors[0].shape[axis]
    half = size // 2
    # Where the model's code branches on values, it may do so on those of each sample.
    parts = [range(half), range(half, size)] if captured.batched else [[i] for i in range(size)]
    with torch.no_grad():
        output = call(*call.tensors)
        for kept in parts:
            # The others become copies of one sample that is kept.
            rows = torch.tensor([i if i in kept else kept[0] for i in range(size)])
            other = call(*(x.index_select(axis, rows.to(x.device)) for x in call.tensors))
            keep = torch.tensor(list(kept), device=output.device)
            if not any(
                length == size
                and _alike(
                    output.index_select(place, keep), other.index_select(place, keep), captured
                )
                for place, length in enumerate(output.shape)
            ):
                raise InputError(
                    f"along axis {axis}, which is taken for the batch, the samples of "
                    f"{type(call.model).__name__} depend on each other: beside others, some have "
                    "another output. Say where the batch is with Explainer(..., batch_axis=1), or "
                    "batch_axis=None if all of a call is one sample (a graph, a sequence)."
                )


def _alike(a: Tensor, b: Tensor, captured: Captured) -> bool:
    tolerance = 1e-9 if a.dtype is torch.float64 and not captured.mixed else 1e-4
    tolerance = 3e-2 if captured.rounds else tolerance
    return float((a - b).abs().max()) <= tolerance * (float(a.abs().max()) or 1.0)


def _without(shape: torch.Size, axis: int | None) -> tuple[int, ...]:
    return tuple(size for place, size in enumerate(shape) if place != axis)


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = type(module)
        if ".quantized" in kind.__module__ and kind.__module__.startswith("torch."):
            raise InputError(
                f"the model is quantised (its module {name!r} is a {kind.__module__}."
                f"{kind.__qualname__}), and whole numbers carry no relevance. Explain the model "
                "that it was made from, in floating point."
            )
        for attribute, held in (*vars(module).items(), *module._parameters.items(),
                                *module._buffers.items()):  # fmt: skip
            if isinstance(held, Tensor) and not is_lazy(held) and not held.is_meta:
                place = f"{name}.{attribute}" if name else attribute
                check_dense(held, f"the model's tensor {place!r}")
        if module.training:
            where = f"its module {name!r}" if name else "it"
            parts = list(module.children())
            new = " What is in it is not: a new module begins in training mode."
            raise InputError(
                f"the model must be in evaluation mode, but {where} is in training mode "
                "(dropout would be random, batch norm would mix samples). Call model.eval()."
                + (new if parts and not any(part.training for part in parts) else "")
            )
        if getattr(module, "max_norm", None) is not None:
            raise InputError(
                f"the embedding {name!r} has max_norm, so that every use changes its weights. "
                "Renormalise them once, and set max_norm to None."
            )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(
                f"parameter {name!r} has no shape yet. Run the model once before explaining it."
            )


def _check_inputs(call: ModelCall, model: nn.Module) -> None:
    if not call.tensors:
        raise InputError("give the model's inputs: none of the arguments is or holds a tensor")
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    for name, x in zip(call.names, call.tensors, strict=True):
        what = f"input {name!r}" if len(call.tensors) > 1 else "the input"
        check_dense(x, what)
        if x.dim() == 0 or x.numel() == 0:
            raise InputError(f"{what} has shape {tuple(x.shape)}: there is no sample in it")
        if parameters and x.device not in {p.device for p in parameters}:
            raise InputError(
                f"{what} is on {x.device}, the model on {parameters[0].device}. "
                f"Move one of them, e.g. x.to({str(parameters[0].device)!r})."
            )
        if not x.is_floating_point():
            continue
        if x.element_size() == 1:
            raise InputError(f"{what} is {x.dtype}: convert it to a type that can be added up.")
        if parameters and x.dtype not in {p.dtype for p in parameters}:
            raise InputError(
                f"{what} is {x.dtype} but the model's parameters are {parameters[0].dtype}. "
                f"Convert one of them, e.g. x.to({parameters[0].dtype})."
            )
        # A mask adds -inf where nothing is to be seen.
        if not bool((torch.isfinite(x) | (is_mask(name) & (x == -torch.inf))).all()):
            raise InputError(f"{what} holds NaN or infinite values")


def _signature(call: ModelCall, along: int | None) -> tuple[Any, ...]:
    """What calls of any batch size have in common that one graph may serve."""
    shapes = ((_without(x.shape, along), x.dtype, x.device) for x in call.tensors)
    return (along, *call.key, *shapes)
