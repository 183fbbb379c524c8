"""Export: bake a head map into a model and write a bundle that the runtime opens."""

from forcingkv.export.bundle_writer import EngineError, VerificationError, export_bundle

__all__ = ["EngineError", "VerificationError", "export_bundle"]
