"""What keys and values are called in TRL, verl and transformers, for those who come from there."""

from collections.abc import Container

# Their name -> the key here, with what goes with it after a comma. `|` separates the keys of the
# trainers with rollouts and of sft. What has no key stands behind a dash.
KEYS: dict[str, str] = {
    # model
    "model_name_or_path": "actor.model_name",
    "pretrained_model_name_or_path": "actor.model_name",
    "pretrain": "actor.model_name",
    "model_path": "actor.model_name",
    "model.path": "actor.model_name",
    "model": "actor.model_name",
    "tokenizer_name": "- the tokenizer is the model's",
    "ref_model": "ref_actor.model_name",
    "torch_dtype": "actor.dtype",
    "bf16": "actor.dtype, bfloat16",
    "fp16": "actor.dtype, bfloat16 or float32: fp16 is not trained in",
    "tf32": "actor.dtype, bfloat16 or float32",
    "mixed_precision": "actor.dtype",
    "precision": "actor.dtype",
    "use_liger": "actor.use_liger_kernel",
    "use_remove_padding": "- sequences are packed without padding anyway",
    "packing": "- sequences are packed anyway",
    "padding_free": "- sequences are packed anyway",
    "enable_gradient_checkpointing": "actor.gradient_checkpointing",
    "torch_compile": "actor.compile",
    "use_torch_compile": "actor.compile",
    "param_offload": "actor.offload_model",
    "optimizer_offload": "actor.offload_optimizer",
    "use_peft": "actor.lora.rank",
    "lora_r": "actor.lora.rank",
    "lora_rank": "actor.lora.rank",
    "lora_alpha": "actor.lora.alpha",
    "lora_dropout": "actor.lora.dropout",
    "lora_target_modules": "actor.lora.target_modules",
    # optimizer
    "learning_rate": "actor.lr",
    "lr_scheduler_type": "actor.scheduler",
    "lr_scheduler": "actor.scheduler",
    "warmup_steps": "actor.warmup_ratio, a fraction of all optimizer steps",
    "lr_warmup_steps": "actor.warmup_ratio, a fraction of all optimizer steps",
    "lr_warmup_steps_ratio": "actor.warmup_ratio",
    "grad_clip": "actor.max_grad_norm",
    "max_norm": "actor.max_grad_norm",
    "optim": "- the optimizer is AdamW",
    "adam_beta1": "- AdamW's betas are those of torch",
    "adam_beta2": "- AdamW's betas are those of torch",
    "adam_epsilon": "- AdamW's epsilon is that of torch",
    # batches
    "train_batch_size": "train_data.prompts_per_rollout | data.batch_size",
    "per_device_train_batch_size": "train_data.prompts_per_rollout, over all ranks | "
    "data.batch_size, over all ranks",
    "generation_batch_size": "train_data.prompts_per_rollout",
    "rollout_batch_size": "train_data.prompts_per_rollout",
    "global_batch_size": "train_data.prompts_per_rollout | data.batch_size",
    "gradient_accumulation_steps": "actor.max_length_per_device, the tokens of one forward, from "
    "which it follows",
    "ppo_mini_batch_size": "actor.update_per_rollout, optimizer steps on each rollout",
    "mini_batch_size": "actor.update_per_rollout, optimizer steps on each rollout",
    "num_iterations": "actor.update_per_rollout, optimizer steps on each rollout",
    "ppo_epochs": "actor.update_per_rollout, optimizer steps on each rollout",
    "steps_per_generation": "actor.update_per_rollout, optimizer steps on each rollout",
    "ppo_micro_batch_size": "actor.max_length_per_device, in tokens",
    "ppo_micro_batch_size_per_gpu": "actor.max_length_per_device, in tokens",
    "micro_batch_size": "actor.max_length_per_device, in tokens",
    "ppo_max_token_len_per_gpu": "actor.max_length_per_device",
    "max_token_len_per_gpu": "actor.max_length_per_device",
    "use_dynamic_bsz": "actor.max_length_per_device, up to which a forward is filled",
    "max_seq_length": "actor.max_length_per_device | data.max_length",
    "max_seq_len": "actor.max_length_per_device | data.max_length",
    "cutoff_len": "actor.max_length_per_device | data.max_length",
    "ulysses_sequence_parallel_size": "actor.sp_size",
    "sequence_parallel_size": "actor.sp_size",
    "tensor_model_parallel_size": "rollout.tp_size | actor.tp_size",
    "tensor_parallel_size": "rollout.tp_size | actor.tp_size",
    "vllm_tensor_parallel_size": "rollout.tp_size",
    # data
    "dataset": "train_data.path | data.path",
    "dataset_name": "train_data.path | data.path",
    "train_file": "train_data.path | data.path",
    "train_files": "train_data.path | data.path",
    "train_dataset": "train_data.path | data.path",
    "eval_dataset": "test_data.path",
    "val_files": "test_data.path",
    "filter_overlong_prompts": "train_data.overlong, error or drop | data.overlong, error or drop",
    "reward_funcs": "rollout.env_path, a python file whose `step` gives the reward",
    "reward_model": "rollout.env_path, a python file whose `step` gives the reward",
    "reward_function": "rollout.env_path, a python file whose `step` gives the reward",
    "custom_reward_function": "rollout.env_path, a python file whose `step` gives the reward",
    # rollout
    "num_generations": "train_data.responses_per_prompt",
    "rollout.n": "train_data.responses_per_prompt",
    "n_samples_per_prompt": "train_data.responses_per_prompt",
    "group_size": "train_data.responses_per_prompt",
    "max_completion_length": "rollout.train_sampling_params.max_new_tokens",
    "max_response_length": "rollout.train_sampling_params.max_new_tokens",
    "response_length": "rollout.train_sampling_params.max_new_tokens",
    "generate_max_len": "rollout.train_sampling_params.max_new_tokens",
    "max_tokens": "rollout.train_sampling_params.max_new_tokens",
    "max_length": "rollout.train_sampling_params.max_new_tokens | data.max_length",
    "max_prompt_len": "train_data.max_prompt_length",
    "do_sample": "rollout.test_sampling_params.temperature, 0 for greedy",
    "use_vllm": "rollout.engine, vllm",
    "vllm_server_host": "rollout.server_url",
    "vllm_server_base_url": "rollout.server_url",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "vllm_enable_sleep_mode": "rollout.sleep",
    "free_cache_engine": "rollout.sleep",
    "max_assistant_turns": "rollout.max_turns",
    "filter_groups": "rollout.dynamic_filtering",
    # objective
    "adv_estimator": "adv.estimator",
    "advantage_estimator": "adv.estimator",
    "norm_adv_by_std_in_grpo": "adv.norm_var",
    "scale_rewards": "adv.norm_var",
    "whiten_advantages": "adv.global_norm, with adv.norm_var",
    "lam": "adv.lamda",
    "lambda": "adv.lamda",
    "loss_type": "actor.loss.name",
    "loss_agg_mode": "actor.avg_level",
    "loss_mode": "actor.loss.name",
    "epsilon": "actor.clip",
    "cliprange": "actor.clip",
    "clip_range": "actor.clip",
    "clip_eps": "actor.clip",
    "eps_clip": "actor.clip",
    "clip_ratio": "actor.clip",
    "clip_ratio_low": "actor.loss.clip_low",
    "clip_ratio_high": "actor.loss.clip_high",
    "epsilon_high": "actor.loss.clip_high",
    "beta": "actor.kl.coef, with actor.kl.type=loss",
    "kl_coef": "actor.kl.coef, with actor.kl.type",
    "init_kl_coef": "actor.kl.coef, with actor.kl.type",
    "kl_loss_coef": "actor.kl.coef, with actor.kl.type=loss",
    "use_kl_loss": "actor.kl.type, loss",
    "use_kl_in_reward": "actor.kl.type, reward",
    "kl_loss_type": "actor.kl.loss_estimator",
    "kl_penalty": "actor.kl.reward_estimator",
    "entropy_coeff": "actor.entropy.coef",
    "entropy_coef": "actor.entropy.coef",
    "ent_coef": "actor.entropy.coef",
    "tis_imp_ratio_cap": "actor.tis_coef",
    "vllm_importance_sampling_cap": "actor.tis_coef",
    # the run
    "num_train_epochs": "trainer.n_epochs",
    "total_epochs": "trainer.n_epochs",
    "num_epochs": "trainer.n_epochs",
    "epochs": "trainer.n_epochs",
    "total_training_steps": "trainer.max_steps",
    "total_steps": "trainer.max_steps",
    "output_dir": "trainer.save_dir",
    "default_local_dir": "trainer.save_dir",
    "save_path": "trainer.save_dir",
    "save_steps": "trainer.save_freq",
    "save_total_limit": "trainer.keep_last",
    "max_actor_ckpt_to_keep": "trainer.keep_last",
    "eval_steps": "trainer.test_freq",
    "eval_freq": "trainer.test_freq",
    "eval_strategy": "trainer.test_freq",
    "resume_from_checkpoint": "trainer.load_ckpt_from",
    "resume_mode": "trainer.load_ckpt_from, null or latest",
    "resume_from_path": "trainer.load_ckpt_from",
    "report_to": "trainer.use_wandb",
    "logger": "trainer.use_wandb",
    "project_name": "trainer.project",
    "wandb_project": "trainer.project",
    "run_name": "trainer.experiment_name",
    "exp_name": "trainer.experiment_name",
    "log_completions": "trainer.dump_rollouts",
    "logging_steps": "- every step is logged",
    "n_gpus_per_node": "- torchrun says it: --nproc_per_node",
    "nnodes": "- torchrun says it: --nnodes",
    "num_processes": "- torchrun says it: --nproc_per_node",
}

# By the last part of a key: their value -> what it is here.
VALUES: dict[str, dict[str, str]] = {
    "estimator": {
        "grpo": "GRPO is reinforce with adv.norm_var=true, Dr. GRPO is reinforce alone",
        "dr_grpo": "Dr. GRPO is reinforce",
        "rloo": "reinforce subtracts the mean of all n samples, which is RLOO times (n - 1) / n",
        "reinforce_plus_plus": "that is reinforce with adv.global_norm=true adv.norm_var=true",
        "ppo": "PPO's needs a critic, which this version does not have yet",
        "gae": "it needs a critic, which this version does not have yet",
    },
    "loss.name": {
        "grpo": "its clipped loss is ppo, its advantages are adv.norm_var=true",
        "dr_grpo": "its clipped loss is ppo",
        "dapo": "its clipped loss is ppo, with actor.loss.clip_high above actor.loss.clip_low",
        "reinforce": "with one update a rollout that is ppo",
        "policy_gradient": "with one update a rollout that is ppo",
        "sft": "that is nll",
        "cross_entropy": "that is nll",
    },
    "avg_level": {
        "token-mean": "that is token",
        "seq-mean-token-sum": "that is sequence",
        "batch": "that is token or sequence",
    },
    "dtype": {
        "bf16": "that is bfloat16",
        "fp32": "that is float32",
        "float": "that is float32",
        "fp16": "fp16 would need a scaled loss, which there is not",
        "float16": "fp16 would need a scaled loss, which there is not",
    },
    "device": {"gpu": "that is cuda"},
    "engine": {"hf": "that is transformers"},
    "loss_estimator": {"kl": "that is k1", "mse": "that is k2", "low_var_kl": "that is k3"},
    "reward_estimator": {"kl": "that is k1", "mse": "that is k2", "low_var_kl": "that is k3"},
}


def key_here(key: str, known: Container[str]) -> str | None:
    """What a key of another library is here, None for one that nobody has.

    known: the keys of the trainer.
    """
    parts = key.lower().replace("-", "_").split(".")
    for n in range(len(parts)):
        found = KEYS.get(".".join(parts[n:]))
        for one in (found or "").split(" | "):
            name, _, more = one.partition(", ")
            if one.startswith("- "):
                return f"there is none for it, as {one.removeprefix('- ')}"
            if name in known:
                return f"here that is {name}" + (f" ({more})" if more else "")
    return None


def value_here(name: str, value: object) -> str | None:
    """What a value of another library is here, None where nobody has it. name: of the key's end."""
    return VALUES.get(name, {}).get(str(value).lower())
