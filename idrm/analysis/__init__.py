"""Analyses of reward models: where they look, how two sequences interact in them, and what alpha and m do."""

from idrm.analysis.interaction_scores import InteractionScores, interaction_scores
from idrm.analysis.sensitivity import find_runs, sweep
from idrm.analysis.stages import StageAnalysis, attention_by_stage

__all__ = [
    "InteractionScores",
    "StageAnalysis",
    "attention_by_stage",
    "find_runs",
    "interaction_scores",
    "sweep",
]
