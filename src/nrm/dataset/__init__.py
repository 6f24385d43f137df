"""Relevance over whole data sets: statistics and reference samples of every channel (eq. 50).

`relmax` asks, `open_results` reads what it wrote. Needs pyarrow (`nrm[dataset]`).
"""

from nrm.dataset.results import Flow, Heatmaps, Reference, Results, open_results
from nrm.dataset.run import relmax
from nrm.dataset.samples import Sample
from nrm.dataset.sources import Archives, Pictures, Rows, Source, Stream, as_source

__all__ = [
    "Archives",
    "Flow",
    "Heatmaps",
    "Pictures",
    "Reference",
    "Results",
    "Rows",
    "Sample",
    "Source",
    "Stream",
    "as_source",
    "open_results",
    "relmax",
]
