"""The explorer: a page in the browser whose every click conditions the measure.

- `selection`: what was clicked, as a formula, in the paper's notation and as Python.
- `opened`: a model with its inputs, and how a script makes them again.
- `columns`: the layers that may be shown; `divided`: into which parts.
- `explained`: which output is explained, and where.
- `answers`: what a request asks for, and the parts of an answer.
- `view`: how they are found: totals, columns of channels, flows, a heatmap.
- `session`: one browser tab, the measures it keeps; a newer click ends an older one.
- `server`: the HTTP server behind the page, which alone needs `nrm[explore]`.

Two more ways to the same page need no server: `kept` writes it as one file, `widget` shows it in
a notebook.
"""
