"""The paper's experiments (section 4), one file each, run by `nrm reproduce NAME`.

command     the command, the experiments by name, and all of them together
report      what an experiment is asked and answers: a page, its pictures, tables, JSON
data        digits, photographs, made series, molecules
networks    the networks, trained or pretrained
pretrained  networks that others trained, from the data or from packages
comparison  relevance by several walks and scores beside interventions, for mlp, cnn and rules

edge_ablation, attribution, ioi  for circuits: a Llama in plain torch and what few edges leave of
            it; what others say, and patching; indirect objects
studies, candidates, across_figures  for networks (across_networks): the networks and what is
            compared in each; walks, what they cost and how much cancels; figures

Imports run upwards only: report and data; networks; comparison; the experiments; command.
"""
