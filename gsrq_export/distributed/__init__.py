"""Calibration by many processes, on one machine or several, under torchrun (docs/distributed.md)."""
