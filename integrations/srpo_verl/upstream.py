"""Every name of verl, TransferQueue and Ray that the adapter relies on, in one place, checked when a run starts.

Most of them are private and may move with any release. That verl still calls what exists is for :mod:`srpo_verl.proof`.
"""

import inspect
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from pkgutil import resolve_name
from typing import Any

__all__ = ["ATTRIBUTES", "FUNCTIONS", "KNOWN", "check_attributes", "check_functions", "installed", "unknown_version"]

#: As in pyproject.toml.
KNOWN = "verl>=0.9.1,<0.10"

_TRAINER = "verl.trainer.ppo.v1:PPOTrainerSync"
#: Where something is, and by which arguments it is called or extended; None: it is only looked up.
FUNCTIONS: dict[str, str | None] = {
    "verl.trainer.ppo.v1:register_trainer": "name",
    f"{_TRAINER}.__init__": "self config",
    f"{_TRAINER}._init_resource_pool_mgr": "self",
    f"{_TRAINER}._setup": "self",
    f"{_TRAINER}._compute_advantage": "self batch metrics",
    f"{_TRAINER}._update_actor": "self batch metrics",
    f"{_TRAINER}.on_step_end": "self",
    "verl.utils.config:validate_config": "config use_reference_policy use_critic",
    "verl.utils.tensordict_utils:get": "tensordict key",
    "verl.utils.tensordict_utils:pop": "tensordict key",
    "verl.utils.tensordict_utils:maybe_fix_3d_position_ids": "data",
    "verl.utils.profiler:DistProfiler.annotate": "color role",
    "verl.workers.utils.padding:response_from_nested": "tensor response_mask",
    "verl.workers.utils.padding:response_to_nested": "tensor response_mask",
    "verl.workers.engine_workers:ActorRolloutRefWorker": None,
    "verl.workers.engine_workers:TrainingWorker.infer_batch": "self data",
    "verl.single_controller.base.decorator:register": "dispatch_mode",
    "verl.single_controller.base.decorator:make_nd_compute_dataproto_dispatch_fn": "mesh_name",
    "verl.single_controller.base.decorator:Dispatch.ONE_TO_ALL": None,
    "transfer_queue:kv_batch_get": "keys partition_id select_fields",
    "transfer_queue:kv_batch_put": "keys partition_id fields",
    "transfer_queue:KVBatchMeta": "keys tags partition_id fields extra_info",
    "ray:remote": None,
    "ray.exceptions:RayTaskError": None,
}
#: What an object holds once verl has set it up.
ATTRIBUTES = {
    "resource pools": ("role_worker_mapping",),
    "remote class": ("__ray_metadata__.modified_class.__name__",),
    "trainer": (
        "actor_rollout_wg.setup_srpo",  # missing: SRPO's worker was not started in the place of verl's
        "actor_rollout_wg.compute_srpo_log_probs",
        "config.actor_rollout_ref.rollout",
        "config.trainer.critic_warmup",
        "global_steps",
        "tokenizer.pad_token_id",
    ),
    "worker": ("actor.model_config.processor", "actor.model_config.tokenizer", "actor.model_config.generation_config"),
}


def check_functions() -> None:
    """Raise unless every function is where it was, and takes the arguments that it took.

    Raises:
        RuntimeError: Naming the function, the known versions and those installed.
    """
    for name, arguments in FUNCTIONS.items():
        try:
            found = resolve_name(name)
        except (ImportError, AttributeError) as error:
            raise unknown_version(f"{name} does not exist") from error
        if arguments is None:
            continue
        try:
            inspect.signature(found).bind(**dict.fromkeys(arguments.split()))
        except TypeError as error:
            raise unknown_version(f"{name} takes other arguments than {arguments} ({error})") from error


def check_attributes(of: str, owner: Any) -> None:
    """Raise unless an object holds what the adapter reads.

    Args:
        of: Which entry of :data:`ATTRIBUTES`.
        owner: The object.

    Raises:
        RuntimeError: Naming the attribute, the known versions and those installed.
    """
    for path in ATTRIBUTES[of]:
        try:
            attrgetter(path)(owner)
        except AttributeError as error:
            raise unknown_version(f"{path} of the {of} ({type(owner).__name__}) does not exist") from error


def unknown_version(problem: str) -> RuntimeError:
    """The error that a problem with names of verl ends in."""
    return RuntimeError(f"{problem}, so there would be no SRPO: srpo_verl knows {KNOWN}; installed are {installed()}")


def installed() -> str:
    """The versions of what the adapter relies on."""
    versions = []
    for name in ("verl", "TransferQueue", "ray"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} without metadata")
    return ", ".join(versions)
