"""Preference data: raw records of the usual formats in, message lists out."""

from idrm.preference.formats import STRENGTH_COLUMN, WITHOUT_MARGINS, PairColumns, convert_record, drop_reason
from idrm.preference.loading import PreferenceReport, load_preferences

__all__ = [
    "STRENGTH_COLUMN",
    "WITHOUT_MARGINS",
    "PairColumns",
    "PreferenceReport",
    "convert_record",
    "drop_reason",
    "load_preferences",
]
