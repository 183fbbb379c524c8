"""Head maps: which attention heads are static and which dynamic."""

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.headmaps.headmap import DYNAMIC, STATIC, HeadMap, ModelIdentity, Rule, Statistics

__all__ = [
    "DYNAMIC",
    "STATIC",
    "HeadMap",
    "InputError",
    "MissingExtraError",
    "ModelIdentity",
    "Rule",
    "Statistics",
]
