"""Settings that would make the weights wrong or were never tried: refused at start-up, each with a sentence."""

from typing import Any

from srpo_core import SRPOConfig

__all__ = ["check_arguments", "check_config"]

_AVERAGES = "averages the advantages of a response back to one, and weights that average to 1 change nothing"


def check_config(config: SRPOConfig) -> None:
    """Raise if an option of SRPO cannot work inside ms-swift.

    Raises:
        ValueError: One line for each such option.
    """
    _refuse(
        (
            config.corruption == "none",
            "--srpo_corruption none: a pass without any image needs prompts rebuilt without its placeholders; "
            "pass black or patch_mask",
        ),
        (
            config.counterfactual == "mask",
            "--srpo_counterfactual mask: not every model hides what an attention mask hides; pass drop, which removes "
            "the perception",
        ),
        (
            config.scale == "ema_rms",
            "--srpo_scale ema_rms: its moving average would be lost when a run resumes; pass batch_rms",
        ),
    )


def check_arguments(args: Any, template: Any) -> None:
    """Raise if a setting of ``swift rlhf`` cannot work with SRPO.

    Args:
        args: The trainer's ``GRPOConfig``.
        template: The trainer's template.

    Raises:
        ValueError: One line for each such setting.
    """
    teachers = ("teacher_model", "teacher_adapters", "teacher_model_server")
    _refuse(
        (args.use_liger_kernel, f"--use_liger_kernel true: its loss {_AVERAGES}; leave it out"),
        (args.loss_type == "real", f"--loss_type real: this loss {_AVERAGES}; pass grpo, bnpo, dr_grpo or dapo"),
        (
            args.loss_type == "fipo",
            "--loss_type fipo: it already gives each token a weight of its own; pass grpo, bnpo, dr_grpo or dapo",
        ),
        (
            args.importance_sampling_level == "sequence",
            "--importance_sampling_level sequence: with one ratio for the whole response, weights that average to 1 "
            "change nothing; pass token or sequence_token",
        ),
        (
            args.kl_in_reward and args.beta > 0,
            "--kl_in_reward true: the KL penalty would be inside the advantages and be weighted with them; pass false",
        ),
        (
            args.advantage_reweight not in (None, "none") or args.sdar_loss_coef > 0,
            "--advantage_reweight, --sdar_loss_coef: these already give each token an advantage of its own; leave them "
            "out",
        ),
        (
            any(getattr(args, name, None) for name in teachers),
            "--teacher_model, --teacher_adapters, --teacher_model_server: a teacher already gives each token an "
            "advantage of its own; leave it out",
        ),
        (
            args.multi_turn_scheduler is not None,
            "--multi_turn_scheduler: processes may then hold different numbers of responses; leave it out",
        ),
        (
            template.sequence_parallel_size > 1 or template.padding_free,
            "--sequence_parallel_size above 1, --padding_free true, --packing true: SRPO was not tried with them; "
            "leave them out",
        ),
    )


def _refuse(*rules: tuple[bool, str]) -> None:
    sentences = [sentence for applies, sentence in rules if applies]
    if sentences:
        raise ValueError("SRPO refuses these settings:\n  " + "\n  ".join(sentences))
