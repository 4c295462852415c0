"""Served by gsrq_export, which must be installed for this server's Python."""

from gsrq_export.serve.triton_model import TritonPythonModel  # noqa: F401
