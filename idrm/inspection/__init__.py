"""What a teacher's attention maps look like, so that a user sees before training whether it is fit, and which block."""

from idrm.inspection.findings import Inspection, TeacherFindings
from idrm.inspection.inspection import inspect_teacher
from idrm.inspection.measures import BlockMeasures

__all__ = ["BlockMeasures", "Inspection", "TeacherFindings", "inspect_teacher"]
