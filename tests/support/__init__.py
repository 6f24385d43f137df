"""What tests share: oracles that know nothing of nrm, and the networks they are asked about."""
