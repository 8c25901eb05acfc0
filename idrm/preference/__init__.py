"""Preference data: raw records of the usual formats in, message lists out."""

from idrm.preference.formats import convert_record, drop_reason
from idrm.preference.loading import PreferenceReport, load_preferences

__all__ = ["PreferenceReport", "convert_record", "drop_reason", "load_preferences"]
