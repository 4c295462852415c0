"""GSRQ: coded key-value caches for transformer decoders, from calibration to deployable artifacts."""

from gsrq_export.cache.rule import CacheRule
from gsrq_export.cache.torch_cache import GsrqCache, coded
from gsrq_export.codec.codebook import Codebook, LayerCodebooks
from gsrq_export.errors import GsrqError

__all__ = ["CacheRule", "Codebook", "GsrqCache", "GsrqError", "LayerCodebooks", "coded"]

__version__ = "0.1.0"
