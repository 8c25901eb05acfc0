"""The teacher's attention of every pair on disk, so that later epochs and later runs need no teacher forward."""

from idrm.teacher_cache.cache import CachedAttention, TeacherCache, prepare_cache_folder
from idrm.teacher_cache.cached_teacher import CachedTeacher, ReleaseTeacher

__all__ = ["CachedAttention", "CachedTeacher", "ReleaseTeacher", "TeacherCache", "prepare_cache_folder"]
