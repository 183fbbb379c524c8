"""Export: bake a head map into a model and write a bundle that the runtime opens."""

from forcingkv.export.bundle_parts import VerificationError
from forcingkv.export.bundle_writer import export_bundle
from forcingkv.export.engine_builder import EngineError

__all__ = ["EngineError", "VerificationError", "export_bundle"]
