#!/usr/bin/env bash
# verl's real command line on a CPU: train.sh WORK MODE WORKERS [overrides...]. Prints to WORK/<name>.log via the caller.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$1 mode=$2 workers=$3
shift 3
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
export VERL_USE_EXTERNAL_MODULES=verl_harness.platform,verl_harness.engine
export VERL_PLATFORM=cpu VERL_ENGINE_DEVICE=cuda OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export RAY_DEDUP_LOGS=0 RAY_USAGE_STATS_ENABLED=0 VERL_FILE_LOGGER_ROOT="$work"
exec "${PYTHON:-python}" -m verl.trainer.main_ppo \
  hydra.run.dir="$work/hydra" trainer.v1.trainer_mode="$mode" trainer.device=cpu trainer.n_gpus_per_node="$workers" trainer.nnodes=1 \
  'trainer.logger=[console,file]' trainer.val_before_train=False trainer.test_freq=-1 trainer.save_freq=-1 \
  trainer.total_training_steps=2 trainer.total_epochs=20 trainer.project_name=srpo trainer.resume_mode=disable \
  trainer.default_local_dir="$work/checkpoints" \
  data.train_files="$work/prompts.parquet" data.val_files="$work/prompts.parquet" data.train_batch_size=4 \
  data.val_batch_size=4 data.max_prompt_length=256 data.max_response_length=256 data.dataloader_num_workers=0 \
  data.filter_overlong_prompts=False data.shuffle=False \
  algorithm.adv_estimator=grpo algorithm.use_kl_in_reward=False \
  actor_rollout_ref.model.path="$work/model" actor_rollout_ref.model.use_remove_padding=False \
  actor_rollout_ref.model.enable_gradient_checkpointing=False \
  +actor_rollout_ref.model.override_config.attn_implementation=sdpa \
  actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.use_torch_compile=False \
  actor_rollout_ref.actor.fsdp_config.use_torch_compile=False actor_rollout_ref.actor.fsdp_config.dtype=float32 \
  +actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32 \
  +actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32 \
  actor_rollout_ref.actor.ppo_mini_batch_size=4 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \
  actor_rollout_ref.actor.use_kl_loss=False actor_rollout_ref.actor.ppo_epochs=2 actor_rollout_ref.actor.optim.lr=1e-3 \
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=4 \
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 actor_rollout_ref.rollout.calculate_log_probs=True \
  +actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl_harness.engine.ScriptedRollouts \
  reward.num_workers=1 transfer_queue.backend.SimpleStorage.num_data_storage_units=1 \
  transfer_queue.backend.SimpleStorage.total_storage_size=1000 \
  ray_kwargs.ray_init.num_cpus=8 +ray_kwargs.ray_init.num_gpus="$workers" \
  +ray_kwargs.ray_init.include_dashboard=False "$@"
