raise ImportError("srpo_openrlhf is not there yet; call srpo_core.srpo_advantages from your own trainer")
