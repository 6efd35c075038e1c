"""What the agents see: data sets in memory, their partitions over agents, and batches of them."""
