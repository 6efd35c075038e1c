"""Run folders, read back: tables and pictures."""
