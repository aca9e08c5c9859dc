"""Settings that would make the weights wrong or were never tried: refused at start-up, each with a sentence."""

from argparse import Namespace
from types import SimpleNamespace

from srpo_core import SRPOConfig

__all__ = ["check_arguments", "check_config"]


def check_config(config: SRPOConfig) -> None:
    """Raise if an option of SRPO cannot work inside OpenRLHF.

    Raises:
        ValueError: One line for each such option.
    """
    _refuse(
        (
            config.corruption == "none",
            "--srpo.corruption none: a pass without any image needs prompts rebuilt without its placeholders; "
            "pass black or patch_mask",
        ),
        (
            config.counterfactual == "mask",
            "--srpo.counterfactual mask: not every model hides what an attention mask hides, and packing has no mask; "
            "pass drop, which removes the perception",
        ),
        (
            config.scale == "ema_rms",
            "--srpo.scale ema_rms: its moving average would be lost when a run resumes; pass batch_rms",
        ),
    )


def check_arguments(args: Namespace | SimpleNamespace) -> None:
    """Raise if a setting of ``train_ppo_ray`` cannot work with SRPO.

    Args:
        args: The parsed and completed arguments, nested as OpenRLHF nests them: ``args.actor.policy_loss_type``.

    Raises:
        ValueError: One line for each such setting.
    """
    advantage, kl = args.algo.advantage, args.algo.kl
    _refuse(
        (
            args.actor.policy_loss_type == "gspo",
            "--actor.policy_loss_type gspo: with one ratio for the whole response, weights that average to 1 change "
            "nothing; pass ppo",
        ),
        (
            bool(args.critic.model_name_or_path),
            "--algo.advantage.estimator gae: a critic already gives each token an advantage of its own; pass "
            "group_norm, dr_grpo, rloo, reinforce_baseline or reinforce",
        ),
        (
            kl.init_coef > 0 and not kl.use_loss,
            "--algo.kl.init_coef above 0 without --algo.kl.use_loss: the KL penalty would sit inside the advantages "
            "and be weighted with them; add --algo.kl.use_loss, or pass --algo.kl.init_coef 0",
        ),
        (
            advantage.estimator == "reinforce" and advantage.gamma != 1.0,
            "--algo.advantage.gamma other than 1: SRPO weights one advantage per response; pass 1",
        ),
        (
            args.ds.packing_samples and args.data.max_images_per_prompt > 0,
            "--ds.packing_samples with images: OpenRLHF cannot keep image tokens and pixels together; leave it out",
        ),
        (
            args.ds.ring_attn_size > 1 or args.ds.tensor_parallel_size > 1,
            "--ds.ring_attn_size, --ds.tensor_parallel_size above 1: SRPO was not tried with them; pass 1",
        ),
    )


def _refuse(*rules: tuple[bool, str]) -> None:
    sentences = [sentence for applies, sentence in rules if applies]
    if sentences:
        raise ValueError("SRPO refuses these settings:\n  " + "\n  ".join(sentences))
