"""SRPO in verl's Ray trainer (>= 0.9.1): ``trainer.v1.trainer_mode=srpo``, options under ``+algorithm.srpo.*``.

========== ======================================================================================================
options    the command line -> :class:`~srpo_core.SRPOConfig`, and a sentence on whatever cannot work
plugin     what verl loads: lets verl know the trainer, lazily, and checks the command line before Ray starts
trainer    the driver: roles, counterfactual token ids, weights; token ids and log-probs only, never pixels
worker     each rank: corrupted pixels and changed responses of its own rows, scored by the actor's engine
========== ======================================================================================================

verl's loss, KL, aggregation and data path stay verl's; only ``advantages`` are multiplied by the weights.
"""
