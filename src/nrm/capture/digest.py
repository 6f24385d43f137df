"""Short digests of tensors' contents, by position, as fast as memory is read.

An exact digest is made of sums of the contents' 64-bit words, each times an odd random number of
its own, modulo 2^64. A second sum takes the upper halves of the words alone, whose changes (the
sign of a number) would be lost at the top of the first. One word that changes always changes the
first sum; any other change is overlooked with a probability of 2^-32, whatever it is.

Multiplications of integers are slower than memory. Of large tensors of real numbers a digest is
therefore made of the plain sum of the words, which any single change changes, to the last digit,
and of each row's product with random numbers, which tells positions and signs apart to rounding:
numbers may change places unseen only where they add up to the same and differ by less than a
millionth of the row's largest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from nrm.errors import QueryError

Digest = tuple[object, ...]
"""Of one tensor: how it looks, and what it holds."""

_CHUNK = 2**15  # words: with the factors and products, what a processor's own cache holds
_SMALL = 2**11  # bytes: below, an ordinary hash is quicker
_LARGE = 2**20  # bytes: above, real numbers are read once, by sums and products
_ROW = 2**12  # of numbers, in a large tensor
_ROWS = 2**5  # that one sum of words is of: in a processor's own cache
_ROUNDING = 16  # last digits of a piece's largest product, in which a row's may differ
_PLAIN = (Tensor, torch.nn.Parameter)
_SHARED = (torch.float32, torch.float64, torch.int64)  # real, strided; NumPy knows them


def place_of(tensor: Tensor) -> Hashable:
    """Where a tensor lies, and how it is read there: of two with one place, both hold the same."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)


def contents(tensors: Sequence[Tensor]) -> list[Digest]:
    """A digest of each tensor, of which equal ones hold the same in the same order of memory."""
    found: list[Digest] = [()] * len(tensors)
    far: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        looks = _looks(tensor)
        if tensor.device.type == "meta" or not tensor.numel():
            found[place] = looks
        elif _is_large(tensor):
            found[place] = (*looks, _of_reals(_flat(tensor)))
        elif tensor.device.type == "cpu":
            found[place] = (*looks, *map(of_bytes, _on_cpu(tensor)))
        else:
            far.setdefault(tensor.device, []).append(place)
    for places in far.values():
        parts = [list(_dense(tensors[place])) for place in places]
        digests = iter(on_device([part for group in parts for part in group]))
        for place, group in zip(places, parts, strict=True):
            tensor = tensors[place]
            found[place] = (*_looks(tensor), *(next(digests) for _ in group))
    return found


def refuse_changed(tensors: Sequence[Tensor], before: Sequence[Digest]) -> None:
    """Refuse to go on where tensors hold something else than before.

    Raises:
        QueryError: they do.
    """
    if contents(tensors) != before:
        raise QueryError(
            "the model's weights changed after this measure was made, and it reads them when it "
            "is asked. Call the explainer again."
        )


def of_bytes(raw: np.ndarray) -> bytes:
    """The exact digest of an array `[n]` of bytes, the same in every process."""
    if len(raw) <= _SMALL:
        return _short(raw.tobytes())
    count = len(raw) // 8
    words = raw[: 8 * count].view(np.uint64)
    pieces = -(-count // _CHUNK)
    sums = np.empty((pieces, 2), np.uint64)
    products = np.empty(min(_CHUNK, count), np.uint64)
    for piece in range(pieces):
        these = words[piece * _CHUNK : (piece + 1) * _CHUNK]
        out = products[: len(these)]
        np.multiply(these, _factors()[0, : len(these)], out=out)
        sums[piece, 0] = np.add.reduce(out)
        np.right_shift(these, np.uint64(32), out=out)
        np.multiply(out, _factors()[1, : len(these)], out=out)
        sums[piece, 1] = np.add.reduce(out)
    return _short(sums.tobytes() + raw[8 * count :].tobytes())


def on_device(parts: Sequence[Tensor]) -> list[bytes]:
    """Digests of contiguous byte tensors `[n]`, with one transfer for all of them."""
    if not parts:
        return []
    device = parts[0].device
    factors = torch.from_numpy(_factors().view(np.int64)).to(device)
    sent: list[Tensor] = []
    for raw in parts:
        count = 0 if len(raw) <= _SMALL else len(raw) // 8
        if count:
            words = raw[: 8 * count].view(torch.int64)
            full = count // _CHUNK * _CHUNK
            for piece in (*torch.split(words[:full], _CHUNK * 256), words[full:]):
                if len(piece):
                    rows = piece.view(-1, min(_CHUNK, len(piece)))
                    low = (rows * factors[0, : rows.shape[1]]).sum(1)
                    upper = (rows >> 32) & 0xFFFFFFFF
                    high = (upper * factors[1, : rows.shape[1]]).sum(1)
                    sent.append(torch.stack([low, high], 1).reshape(-1))
        sent.append(raw[8 * count :].to(torch.int64))
    arrived = torch.cat(sent).cpu().numpy()
    digests, at = [], 0
    for raw in parts:
        count = 0 if len(raw) <= _SMALL else len(raw) // 8
        middle = at + 2 * -(-count // _CHUNK)
        end = middle + len(raw) - 8 * count
        rest = arrived[middle:end].astype(np.uint8).tobytes()
        digests.append(_short(arrived[at:middle].tobytes() + rest))
        at = end
    return digests


def as_bytes(tensor: Tensor) -> Tensor:
    """A dense tensor's contents `[n]` in memory order, without a copy where there is an order."""
    return _flat(tensor).view(torch.uint8)


def _flat(tensor: Tensor) -> Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg()
    order = sorted(range(plain.dim()), key=plain.stride, reverse=True)
    raw = plain.permute(order)
    raw = raw if raw.is_contiguous() else plain.contiguous()
    raw = raw.reshape(-1)
    # Words lie at multiples of eight.
    return raw.clone() if raw.storage_offset() * raw.element_size() % 8 else raw


def _looks(tensor: Tensor) -> Digest:
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    return (tensor.dtype, tuple(tensor.shape), strides, tensor.device)


def _dense(tensor: Tensor) -> Iterable[Tensor]:
    """The bytes that a tensor consists of, part by part."""
    if tensor.layout is torch.strided and not tensor.is_quantized:
        parts = [tensor]
    elif tensor.layout is torch.sparse_coo:
        parts = [tensor.detach()._indices(), tensor.detach()._values()]
    elif tensor.is_quantized:
        parts = [tensor.detach().dequantize()]
    else:
        parts = [tensor.detach().to_dense()]
    return map(as_bytes, parts)


def _on_cpu(tensor: Tensor) -> Iterable[np.ndarray]:
    if type(tensor) in _PLAIN and tensor.dtype in _SHARED and tensor.is_contiguous():
        return (tensor.detach().numpy().reshape(-1).view(np.uint8),)  # the common case, quickly
    return (part.numpy() for part in _dense(tensor))


def _is_large(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.float64)
        and tensor.numel() * tensor.element_size() > _LARGE
        and tensor.layout is torch.strided
    )


def _of_reals(values: Tensor) -> _Reals:
    """A digest of a large tensor `[n]` of real numbers, to rounding where only places change."""
    piece = _ROW * _ROWS
    count = len(values) // piece
    whole = values[: count * piece]
    products = whole.new_empty(count * _ROWS)
    sums = torch.empty(count, dtype=torch.int64)
    factors = _real_factors(values.dtype)
    threads = torch.get_num_threads()
    step = 1 if threads == 1 else 8 * threads  # threads wait for each other after every step
    with torch.no_grad():
        for rows, product, words, total in zip(
            torch.split(whole.view(-1, _ROW), step * _ROWS),
            torch.split(products, step * _ROWS),
            torch.split(whole.view(torch.int64).view(count, -1), step),
            torch.split(sums, step),
            strict=True,
        ):
            torch.mv(rows, factors, out=product)
            torch.sum(words, 1, out=total)
    rest = of_bytes(as_bytes(values[count * piece :]).numpy())
    return _Reals(_short(sums.numpy().tobytes() + rest), products.view(count, _ROWS).numpy())


class _Reals:
    """Of a large tensor: what its words add up to, exactly, and its rows' products.

    The products' last digits depend on how many threads computed them, which is no change.
    """

    def __init__(self, sums: bytes, products: np.ndarray) -> None:
        self._sums, self._products = sums, products  # `[pieces, rows]`

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Reals) or self._sums != other._sums:
            return False
        one, two = self._products, other._products
        if one.tobytes() == two.tobytes():
            return True
        rounding = _ROUNDING * np.finfo(one.dtype).eps
        with np.errstate(invalid="ignore", over="ignore"):  # weights may be infinite
            return not (np.abs(one - two) > rounding * np.abs(one).max(1, keepdims=True)).any()

    def __hash__(self) -> int:
        return hash(self._sums)


def lasting(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's values, the same in every process: for what is kept on disk."""
    plain = tensor.detach().cpu()
    plain = plain.int_repr() if plain.is_quantized else plain.to_dense()
    plain = plain.resolve_conj().resolve_neg().contiguous().reshape(-1)
    raw = plain.view(torch.uint8) if plain.numel() else plain
    return hashlib.sha256(raw.numpy().data).hexdigest()


def of_weights(model: nn.Module) -> str:
    """The SHA-256 of all parameters and buffers, and of tensors beside, with their names."""
    beside = [
        (f"{place}.{name}", value)
        for place, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    lines = [
        f"{name} {value.dtype} {tuple(value.shape)} {lasting(value)}\n"
        for name, value in (*model.named_parameters(), *model.named_buffers(), *beside)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@cache
def _factors() -> np.ndarray:
    """`[2, words of a chunk]`, odd: two factors for each word."""
    generator = np.random.Generator(np.random.PCG64(0x6E726D))
    return generator.integers(0, 2**64, (2, _CHUNK), dtype=np.uint64) | np.uint64(1)


@cache
def _real_factors(dtype: torch.dtype) -> Tensor:
    """`[row]`, none near zero."""
    generator = torch.Generator().manual_seed(0x6E726D)
    signs = torch.randint(0, 2, (_ROW,), generator=generator, dtype=dtype) * 2 - 1
    return signs * (torch.rand(_ROW, generator=generator, dtype=dtype) + 0.5)


def _short(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=16).digest()
