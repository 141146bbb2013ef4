"""`profile`: where the time of a model's calls goes, and how near that is to the limits of the machine."""

from .measure import profile
from .result import FusedModule, Profile, Row

__all__ = ["FusedModule", "Profile", "Row", "profile"]
