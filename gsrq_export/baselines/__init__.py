"""Other cache quantizers behind one interface, for comparison: docs/baselines.md."""
