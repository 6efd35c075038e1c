"""Which units of a network can be permuted together: derived by watching a forward pass, and checked."""
