"""Every op in plain PyTorch, with the contract of the compiled ones: fallback, oracle and documentation."""
