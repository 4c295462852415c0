"""Rival cache quantizers and ours on one model, one rule, one text: `gsrq compare`."""
