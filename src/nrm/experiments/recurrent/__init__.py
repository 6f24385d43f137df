"""Relevance over time in a linear recurrent network (section 4.5, Fig. 8).

A series of three states, one-hot, sets its label at one step. A linear cell
`h_t = W [x_t, h_{t-1}] + b` reads it, and the last hidden state says the label. Input and hidden
state are parents of the same neurons, so they are normalised jointly (eqs. 19-23). The step that
deserves the relevance is known, so one sees what a rule makes of it over many steps.
"""

from nrm.experiments.recurrent.relevance import COMPOSITES, Method, relevance_over_time
from nrm.experiments.recurrent.series import Task, all_events, make_series, middle, train

__all__ = [
    "COMPOSITES",
    "Method",
    "Task",
    "all_events",
    "make_series",
    "middle",
    "relevance_over_time",
    "train",
]
