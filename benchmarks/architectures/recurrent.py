"""Recurrent networks and state-space models."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.architectures.cases import (
    IDS,
    Case,
    case,
    ids_of,
    transformers_package,
    words_apart,
)

_BOTH = {"num_layers": 2, "bidirectional": True}


@case("RNN, stacked, bidirectional")
def _rnn(steps: int = 10) -> Case:
    model = nn.RNN(8, 16, batch_first=True, **_BOTH)
    x, middle = torch.randn(1, steps, 8), (steps - 1) // 2
    return Case(model, (x,), target=(middle, None), options={"output": 0})


@case("LSTM, stacked, bidirectional")
def _lstm() -> Case:
    model = nn.LSTM(8, 16, batch_first=True, **_BOTH)
    return Case(model, (torch.randn(1, 10, 8),), target=(4, None), options={"output": 0})


@case("LSTM, sequence first")
def _lstm_sequence_first(steps: int = 10) -> Case:
    model, x = nn.LSTM(8, 16), torch.randn(steps, 1, 8)
    options = {"output": 0, "batch_axis": 1}
    return Case(model, (x,), target=(steps - 1, None), options=options)


@case("GRU, stacked, bidirectional")
def _gru(steps: int = 10) -> Case:
    model = nn.GRU(8, 16, batch_first=True, **_BOTH)
    x, middle = torch.randn(1, steps, 8), (steps - 1) // 2
    return Case(model, (x,), target=(middle, None), options={"output": 0})


@case("GRU, sequence first, stacked, bidirectional")
def _gru_sequence_first() -> Case:
    model = nn.GRU(8, 16, **_BOTH)
    options = {"output": 0, "batch_axis": 1}
    return Case(model, (torch.randn(10, 1, 8),), target=(4, None), options=options)


class CellLoop(nn.Module):
    """An LSTM cell called step by step, over words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.cell = nn.LSTMCell(16, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        words = self.embed(ids)
        h = c = words.new_zeros(len(words), 32)
        for step in range(words.shape[1]):
            h, c = self.cell(words[:, step], (h, c))
        scores: Tensor = self.head(h)
        return scores


@case("LSTMCell in a Python loop")
def _cell_loop(steps: int = 10) -> Case:
    return Case(CellLoop(), (torch.randint(50, (1, steps)),))


@case("RNN with ReLU")
def _rnn_relu() -> Case:
    model = nn.RNN(4, 16, nonlinearity="relu", batch_first=True)
    return Case(model, (torch.randn(1, 8, 4),), target=(7, None), options={"output": 0})


@case("LSTM with projections")
def _lstm_projected() -> Case:
    model = nn.LSTM(4, 16, proj_size=8, num_layers=2, batch_first=True)
    return Case(model, (torch.randn(1, 6, 4),), target=(5, None), options={"output": 0})


class Packed(nn.Module):
    """A GRU over a packed sequence of words; the last of its states."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(50, 8), nn.GRU(8, 16, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        words = nn.utils.rnn.pack_padded_sequence(
            self.embed(ids), lengths, batch_first=True, enforce_sorted=False
        )
        scores: Tensor = self.head(self.gru(words)[1][-1])
        return scores


@case("packed sequence, GRU")
def _packed() -> Case:
    return Case(Packed(), (torch.randint(50, (1, 8)), torch.tensor([6])))


class Attending(nn.Module):
    """An LSTM that translates: at each step it looks back at the words by additive attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.encoder = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(16, 16)
        self.query, self.key, self.score = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        words = self.encoder(self.embed(ids))[0]
        state = words[:, -1]
        for _ in range(3):
            energy = torch.tanh(self.query(state)[:, None] + self.key(words))
            weights = self.score(energy).softmax(1)
            state = self.cell((weights * words).sum(1), state)
        scores: Tensor = self.head(state)
        return scores


@case("sequence to sequence, additive attention")
def _attending() -> Case:
    return Case(Attending(), (torch.randint(50, (1, 6)),))


class QuasiRecurrent(nn.Module):
    """Gates by a convolution, a running average as the state (Bradbury et al. 2017)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, 3 * out, 2)

    def forward(self, x: Tensor) -> Tensor:
        value, keep, show = self.conv(F.pad(x, (1, 0))).chunk(3, 1)
        value, keep, show = value.tanh(), keep.sigmoid(), show.sigmoid()
        state, states = torch.zeros_like(value[..., 0]), []
        for step in range(x.shape[-1]):
            state = keep[..., step] * state + (1 - keep[..., step]) * value[..., step]
            states.append(state)
        shown: Tensor = torch.stack(states, -1) * show
        return shown


@case("QRNN")
def _quasi() -> Case:
    model = nn.Sequential(QuasiRecurrent(4, 8), QuasiRecurrent(8, 8))
    return Case(model, (torch.randn(1, 4, 8),), target=(None, 7))


# state spaces -------------------------------------------------------------------------------------


class Selective(nn.Module):
    """Mamba's selective scan, step by step: how much is kept depends on the input."""

    def __init__(self, width: int = 16, states: int = 4) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.into = nn.Linear(width, 2 * width)
        self.conv = nn.Conv1d(width, width, 3, padding=2, groups=width)
        self.step, self.mix = nn.Linear(width, width), nn.Linear(width, 2 * states)
        self.decay = nn.Parameter(torch.rand(width, states).add(0.5).log())
        self.skip, self.out = nn.Parameter(torch.ones(width)), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.into(self.norm(x)).chunk(2, -1)
        h = F.silu(self.conv(h.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        step = F.softplus(self.step(h))
        write, read = self.mix(h).chunk(2, -1)
        keep = torch.exp(-step[..., None] * self.decay.exp())
        state, made = torch.zeros_like(keep[:, 0]), []
        for t in range(x.shape[1]):
            written = (step[:, t] * h[:, t])[..., None] * write[:, t, None]
            state = keep[:, t] * state + written
            made.append((state * read[:, t, None]).sum(-1))
        y = torch.stack(made, 1) + self.skip * h
        result: Tensor = x + self.out(y * F.silu(gate))
        return result


@case("selective state space, by hand")
def _selective(steps: int = 8) -> Case:
    model = nn.Sequential(Selective(), Selective())
    return Case(model, (torch.randn(1, steps, 16),), target=(steps - 1, None))


class Diagonal(nn.Module):
    """A diagonal state space as the convolution that it is, by Fourier transforms (S4D)."""

    def __init__(self, width: int = 8, states: int = 4) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.rand(width, states))
        self.speed = nn.Parameter(torch.rand(width, states))
        self.weight = nn.Parameter(torch.randn(width, states))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        time = torch.arange(length, dtype=x.dtype)
        wave = torch.exp(-self.rate[..., None] * time) * torch.cos(self.speed[..., None] * time)
        kernel = (self.weight[..., None] * wave).sum(1)
        padded = torch.fft.rfft(x.transpose(1, 2), n=2 * length)
        h = torch.fft.irfft(padded * torch.fft.rfft(kernel, n=2 * length), n=2 * length)
        result: Tensor = x + self.out(torch.relu(h[..., :length].transpose(1, 2)))
        return result


@case("diagonal state space, by Fourier transforms")
def _diagonal() -> Case:
    model = nn.Sequential(Diagonal(), Diagonal())
    return Case(model, (torch.randn(1, 10, 8),), target=(9, None))


def _stateful(name: str, **config: object) -> Case:
    """One of transformers' language models that keep a state."""
    transformers = transformers_package()
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, **IDS, **config}
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**sizes)
    )
    inputs = {"input_ids": ids_of(8), "use_cache": False}
    return Case(model, (), inputs, target=(-1, None), options={"output": "logits"})


@case("Mamba", "transformers")
def _mamba(layers: int = 2) -> Case:
    return _stateful("Mamba", num_hidden_layers=layers, state_size=4)


@case("Mamba 2", "transformers")
def _mamba2() -> Case:
    return _stateful("Mamba2", state_size=8, num_heads=4, head_dim=16, n_groups=2, chunk_size=4)


@case("RWKV", "transformers")
def _rwkv() -> Case:
    return _stateful("Rwkv", attention_hidden_size=32, intermediate_size=64, context_length=16)


@case("RecurrentGemma", "transformers")
def _recurrent_gemma() -> Case:
    return _stateful(
        "RecurrentGemma",
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        lru_width=32,
        attention_window_size=8,
    )


@case("Jamba, attention, states and experts", "transformers")
def _jamba() -> Case:
    built = _stateful(
        "Jamba",
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        use_mamba_kernels=False,
    )
    return replace(built, to_double=words_apart)
