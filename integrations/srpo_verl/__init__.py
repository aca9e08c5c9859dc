"""SRPO in verl's Ray trainer (>= 0.9.1): ``trainer.v1.trainer_mode=srpo``, options under ``+algorithm.srpo.*``.

========== ======================================================================================================
options    the command line -> :class:`~srpo_core.SRPOConfig`, and a sentence on whatever cannot work
plugin     what verl loads: registers the trainer, lazily, and checks the command line before Ray starts
upstream   the table of every name of verl that the others rely on, checked at start-up
trainer    the driver: responses in, advantages out; token ids and log-probs only, never pixels
views      positions and sources of the tokens of changed responses
worker     each rank: its own rows with corrupted pixels and changed responses, scored by the actor's engine
proof      that the weights reached the actor's update
========== ======================================================================================================

verl's loss, KL, aggregation and data path stay verl's; only ``advantages`` are multiplied by the weights.
"""
