"""PyTorch Geometric: nrm as an algorithm of `torch_geometric.explain`.

Example:
    >>> explainer = torch_geometric.explain.Explainer(
    ...     model,
    ...     RelevanceExplainer(),
    ...     explanation_type="model",
    ...     node_mask_type="attributes",
    ...     edge_mask_type="object",
    ...     model_config={"mode": "regression", "task_level": "graph"},
    ... )
    >>> explanation = explainer(data.x, data.edge_index, batch=data.batch)
"""

from __future__ import annotations

import logging
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nrm.composites import Composite
from nrm.errors import InputError, TargetError
from nrm.explainer import Explainer
from nrm.graph_networks import edge_relevance
from nrm.measure import Measure
from nrm.operators import Operator
from nrm.rules import Rule

try:
    from torch_geometric.explain import Explanation
    from torch_geometric.explain.algorithm import ExplainerAlgorithm
    from torch_geometric.explain.config import (
        ExplainerConfig,
        MaskType,
        ModelMode,
        ModelReturnType,
    )
    from torch_geometric.utils import is_sparse, to_edge_index
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'nrm.interop.pyg needs torch_geometric: pip install "nrm[models]"', name=error.name
    ) from error


class RelevanceExplainer(ExplainerAlgorithm):  # type: ignore[misc] # untyped
    """Relevance of nodes, of their features, and of what flows along edges.

    The mask of nodes is the relevance of their features at the input, that of edges the relevance
    of the messages along them, summed over the layers. Both are in units of the output: positive
    values speak for the target, and the mask of nodes adds up to the explained output (to the sum
    of several; its negative for class 0 of a binary classification), less what biases take under
    `bias="input"` and what other real-valued inputs take.

    Arguments:
        composite, bias, fallback: as for `nrm.Explainer`.
        normalized: shares of the explained output, like all other results of nrm, where all of it
            is one. If it is negative, what speaks for the target has a negative share.
    """

    def __init__(
        self,
        composite: Composite | Rule | None = None,
        *,
        bias: Literal["drop", "input"] | None = None,
        fallback: Operator | None = None,
        normalized: bool = False,
    ) -> None:
        super().__init__()
        self.composite, self.bias, self.fallback = composite, bias, fallback
        self.normalized = normalized
        self._explainers: list[Explainer] = []  # of the last model, with what was captured of it

    def supports(self) -> bool:
        """Whether these settings can be explained: raw outputs, of nodes, edges or graphs."""
        returned = self.model_config.return_type
        if returned != ModelReturnType.raw:
            logging.error(
                f"{type(self).__name__} explains logits: it expects return_type 'raw', not "
                f"'{returned.value}'. Explain the model without its last softmax or sigmoid."
            )
            return False
        return True

    def forward(
        self,
        model: nn.Module,
        x: Tensor,
        edge_index: Tensor,
        *,
        target: Tensor,
        index: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Explanation:
        """The masks that the explainer is configured for.

        Arguments:
            edge_index: `[2, edges]`; or what else the model takes in its place: a dense adjacency
                matrix, or a sparse one (torch's, or a `SparseTensor`), whose entries are then the
                edges. Either has node masks alone.
            target: for classification the class of every output row; not read for regression.
            index: the rows of the output to explain; by default all.
            kwargs: further arguments of the model. Weights of edges and adjacencies are structure
                and take no relevance; other real-valued ones do, which is then missing from the
                masks.

        Raises:
            InputError: a heterogeneous graph, or features wanted of integer nodes; or a sparse
                adjacency of a model that computes something else from its edges.
            QueryError: edges wanted of a model that has no messages along edges.
        """
        if not isinstance(x, Tensor) or not (
            isinstance(edge_index, Tensor) or is_sparse(edge_index)
        ):
            raise InputError(
                f"{type(self).__name__} explains homogeneous graphs: x and edge_index are tensors."
            )
        if is_sparse(edge_index):
            if self.explainer_config.edge_mask_type is not None:
                raise InputError(
                    "PyG keeps no edge mask beside a sparse adjacency: give the edges that "
                    "torch_geometric.utils.to_edge_index makes of it, or edge_mask_type=None."
                )
            edge_index, kwargs = _edges_of(model, x, edge_index, kwargs)
        R = self._measure(model, x, edge_index, target, index, kwargs)
        scale = torch.ones_like(R.scale) if self.normalized else R.scale
        config: ExplainerConfig = self.explainer_config
        node_mask = edge_mask = None
        if config.node_mask_type is not None:
            node_mask = scale * _of_nodes(R, x, config.node_mask_type)
        if config.edge_mask_type is not None:
            edge_mask = scale * edge_relevance(R, edge_index)
        return Explanation(node_mask=node_mask, edge_mask=edge_mask)

    def _measure(
        self,
        model: nn.Module,
        x: Tensor,
        edge_index: Tensor,
        target: Tensor,
        index: int | Tensor | None,
        kwargs: dict[str, Any],
    ) -> Measure:
        if not self._explainers or self._explainers[0].model is not model:
            explainer = Explainer(
                model, self.composite, bias=self.bias, batch_axis=None, fallback=self.fallback
            )
            self._explainers = [explainer]
        explainer = self._explainers[0]
        if explainer.graph(x, edge_index, **kwargs).head is None:
            with torch.no_grad():
                output = model(x, edge_index, **kwargs)
        else:  # the logits behind it, of whatever output
            output = explainer(x, edge_index, **kwargs).forward_pass.output
        explained = _explained(output, target, index, self.model_config.mode)
        return explainer(x, edge_index, output_relevance=explained, **kwargs)


def _edges_of(
    model: nn.Module, x: Tensor, adjacency: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """The edges of a sparse adjacency, with the arguments that make the same output of them.

    Rows of the matrix are where edges lead to, as everywhere in PyG; its values are the edges'
    weights, where the model takes some.

    Raises:
        InputError: the model gives another output for the edges.
    """
    (to, source), weight = to_edge_index(adjacency)
    edges = torch.stack([source, to])
    ways: list[dict[str, Any]] = [kwargs]
    if weight is not None and "edge_weight" in signature(model.forward).parameters:
        ways.insert(0, {**kwargs, "edge_weight": weight.to(x.dtype)})
    with torch.no_grad():
        expected = model(x, adjacency, **kwargs)
        tolerance = 1e-9 if expected.dtype is torch.float64 else 1e-4
        for way in ways:
            error = float((model(x, edges, **way) - expected).abs().max())
            if error <= tolerance * max(1.0, float(expected.abs().max())):
                return edges, way
    raise InputError(
        f"{type(model).__name__} gives another output for the edges of the sparse adjacency than "
        "for the matrix itself (its layers do not read the weights of edges, or the model hands "
        "them no edge_weight). Give edge_index, and edge_weight where the model takes it."
    )


def _explained(
    output: Tensor, target: Tensor, index: int | Tensor | None, mode: ModelMode
) -> Tensor:
    """The outputs to explain as they are, with the sign of what speaks for the target; else 0."""
    if mode == ModelMode.multiclass_classification:
        by_row = output if output.dim() > 1 else output.unsqueeze(0)
        chosen = torch.zeros_like(by_row).scatter_(1, target.reshape(-1, 1), 1.0)
    else:
        by_row = output if output.dim() > 1 else output.unsqueeze(1)
        chosen = torch.ones_like(by_row)
    if mode == ModelMode.binary_classification:
        if by_row.shape[1:].numel() != 1:
            raise TargetError(
                f"binary classification has one logit for each row, not {tuple(output.shape)}"
            )
        chosen = (2 * target.to(by_row) - 1).view(by_row.shape)
    if index is not None:
        wanted = torch.arange(len(by_row), device=output.device)[index].reshape(-1)
        rows = torch.bincount(wanted, minlength=len(by_row))  # one named twice counts twice
        chosen = chosen * rows.view(-1, *(1,) * (by_row.dim() - 1))
    return (by_row * chosen).view(output.shape)


def _of_nodes(R: Measure, x: Tensor, kind: MaskType) -> Tensor:
    """The relevance of features at the input, `[nodes, features]`, or summed along one axis."""
    if x.is_floating_point():
        entered = R.graph.captured.inputs[0]
        relevance = R.marginal(R.graph.by_node[entered].name)
    else:
        relevance = R.tokens()
        if kind != MaskType.object:
            raise InputError("integer nodes have no features to explain: node_mask_type='object'.")
    by_node = relevance.reshape(len(relevance), -1)
    if kind == MaskType.object:
        return by_node.sum(1, keepdim=True)
    return by_node.sum(0, keepdim=True) if kind == MaskType.common_attributes else by_node
