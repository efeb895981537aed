"""The user-error family, under the name the rest of `exporter` and `profiles` imports (see graphs/errors.py)."""

from graphs.errors import BundleError, CheckpointError, EngineError, GraphError, UserError, one_of, option

__all__ = ["BundleError", "CheckpointError", "EngineError", "GraphError", "UserError", "one_of", "option"]
