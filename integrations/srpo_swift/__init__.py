"""SRPO inside ms-swift's GRPO: ``python -m srpo_swift rlhf --rlhf_type grpo <its flags> --srpo_strength 1``.

Nothing is forked. The launcher (``__main__``) takes the ``--srpo_*`` options off the command line (``options``) and
runs the stock command with an external plugin (``plugin``), which registers a subclass of ms-swift's trainer
(``trainer``). Settings that would make the weights wrong are refused before anything is trained (``settings``), and
every private name of ms-swift that this relies on is listed and checked in one place (``upstream``).
"""
