"""How agents reach each other: graphs, processes, folders, formats of what travels, and faults."""
