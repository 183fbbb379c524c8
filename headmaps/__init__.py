"""Head maps: which attention heads are static and which dynamic."""

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.headmaps.headmap import (
    DYNAMIC,
    STATIC,
    Budget,
    Choices,
    HeadMap,
    ModelIdentity,
    Rule,
    Source,
    Statistics,
)
from forcingkv.headmaps.readers import read_headmap

__all__ = [
    "DYNAMIC",
    "STATIC",
    "Budget",
    "Choices",
    "HeadMap",
    "InputError",
    "MissingExtraError",
    "ModelIdentity",
    "Rule",
    "Source",
    "Statistics",
    "read_headmap",
]
