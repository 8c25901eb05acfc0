"""Two tokenisations of one preference pair, cut to what each model reads, and the units in which they correspond."""

from idrm.alignment.corpus import AlignmentReport, encode_preferences
from idrm.alignment.encoding import PairEncoder
from idrm.alignment.exchange import exchange_teacher_texts
from idrm.alignment.rendering import frozen_chat_template

__all__ = ["AlignmentReport", "PairEncoder", "encode_preferences", "exchange_teacher_texts", "frozen_chat_template"]
