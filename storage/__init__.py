"""Files: whole or not at all when written, checked when read."""
