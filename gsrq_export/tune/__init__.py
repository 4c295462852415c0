"""Budgets by measurement: which layer's keys and values get how many bytes, for a target of bits or of memory."""
