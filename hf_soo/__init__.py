"""Second-order optimizers for Hugging Face Transformers."""

from hf_soo.engine.optimizer import PreconditionedOptimizer
from hf_soo.registry import available, build_optimizer

__version__ = "0.2.0"

__all__ = ["PreconditionedOptimizer", "__version__", "available", "build_optimizer"]
