"""What nrm costs, beside plain PyTorch and its peers."""
