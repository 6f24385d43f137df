"""Which walks agree best with interventions: rules, biases and outputs, network by network."""
