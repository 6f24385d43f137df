"""A PyTorch model as a flat graph of operators, with module paths as addresses."""
