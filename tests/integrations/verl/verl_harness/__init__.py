"""Test only: verl on a machine without an accelerator, with a tiny model and scripted rollouts.

Ray, the worker group, TransferQueue, the replay buffer, the FSDP2 engine, GRPO, the loss and the metrics stay real.
"""
