"""SRPO inside OpenRLHF's ``train_ppo_ray``: ``python -m srpo_openrlhf <its flags> --srpo.strength 1``.

Nothing is forked. The launcher (``__main__``) takes the ``--srpo.*`` options off the command line (``options``),
refuses settings that would make the weights wrong (``settings``) and runs the stock command line. A Ray worker hook
(``hooks``) then wraps OpenRLHF's experience maker in the one process that imports it. There the policy scores each
batch in other contexts too, and the weights are multiplied into ``advantages`` (``experience``). At the first batch the
adapter proves that these advantages are what OpenRLHF trains on (``proof``).

Importing this package imports neither torch nor OpenRLHF: every Ray worker of the job does so, vLLM's included.
"""
