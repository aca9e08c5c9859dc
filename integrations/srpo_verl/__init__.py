raise ImportError("srpo_verl is not there yet; call srpo_core.srpo_advantages from your own trainer")
