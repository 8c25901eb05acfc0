"""`python -m idrm.policy`, for the launcher: deepspeed --module idrm.policy dpo --deepspeed ds_zero3.json [flags]."""

from idrm.policy.command import main

main()
