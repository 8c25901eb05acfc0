"""Queries and keys of student and teacher, from their own forward passes."""

from idrm.capture.interface import CapturedBlock
from idrm.capture.layers import resolve_layers
from idrm.capture.student import QueryKeyCapture, check_supported
from idrm.capture.teacher import Teacher

__all__ = ["CapturedBlock", "QueryKeyCapture", "Teacher", "check_supported", "resolve_layers"]
