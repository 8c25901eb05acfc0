"""Preference objectives beside plain Bradley-Terry (docs/objectives.md): terms that compose with one another."""

from idrm.objectives.bottleneck import GaussianBottleneck, attach_bottleneck
from idrm.objectives.label_flipping import flip_labels
from idrm.objectives.pair_order import draw_pair_order
from idrm.objectives.preference_loss import PreferenceLoss

__all__ = ["GaussianBottleneck", "PreferenceLoss", "attach_bottleneck", "draw_pair_order", "flip_labels"]
