"""Policies: SFT, DPO, RLOO and PPO with TRL's trainers, and responses to be judged (docs/policies.md)."""

import os

# TRL warns that its PPO may change with the next release, which is why one release is pinned.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
