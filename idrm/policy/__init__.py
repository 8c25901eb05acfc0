"""Policies: SFT, DPO, RLOO and PPO with TRL's trainers, and responses to be judged (docs/policies.md)."""
