"""A reward model as a judge: a sequence classifier of transformers with one label."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from RL2.config.models import hub_options, weight_options
from RL2.models.saved import load_whole, own_memory, saved_config
from RL2.rollout.samples import Group, Sample
from RL2.runtime.errors import ConfigError, first_line


class RewardModel:
    """Scores finished samples, which become their rewards; the environment's scores stay.

    A model with the policy's vocabulary reads the tokens of a sample as they are, prompt and answer
    with its end token: what a reward model of RL2.trainer.rm has learned from. Any other reads the
    text, as a user's message with the prompt and an assistant's with the answer in its own chat
    template, or one after the other if it has none.

    Args:
        rollout: the config's node `rollout`, of which it takes `reward_model`.

    Raises ConfigError if that names no sequence classifier with one label.
    """

    def __init__(self, rollout: Mapping[str, Any]):
        self.config = rollout["reward_model"]
        name = self.config.model_name
        try:
            saved = saved_config(name, hub_options(self.config))
        except ConfigError:
            raise
        except Exception as error:  # a broken file makes it raise anything
            raise ConfigError(
                f"rollout.reward_model.model_name={name}: cannot be read ({first_line(error)}); "
                "give a folder made by save_pretrained, such as the final/ of RL2.trainer.rm"
            ) from error
        kinds = saved.architectures or ["no architecture"]
        if not kinds[0].endswith("ForSequenceClassification") or saved.num_labels != 1:
            labels = f" with {saved.num_labels} labels" * kinds[0].endswith("Classification")
            raise ConfigError(
                f"rollout.reward_model.model_name={name}: is a {kinds[0]}{labels}; give a sequence "
                "classification model with one label, such as the final/ of RL2.trainer.rm"
            )

    def start(self, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Load the model. tokenizer: the policy's. device: this rank's, unless the config says
        another."""
        name, asked = self.config.model_name, str(self.config.device)
        self.device = device if asked == "auto" else torch.device(asked)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, **hub_options(self.config))
            model, found = load_whole(
                name, weight_options(self.config), AutoModelForSequenceClassification, dtype="auto"
            )
        except ConfigError:
            raise
        except Exception as error:  # as above
            raise ConfigError(
                f"rollout.reward_model.model_name={name}: cannot be loaded ({first_line(error)})"
            ) from error
        if self.tokenizer.get_vocab().keys() <= {*self.tokenizer.all_special_tokens}:
            raise ConfigError(
                f"rollout.reward_model.model_name={name}: has no tokenizer files, such as "
                "tokenizer.json; save the model's tokenizer there with save_pretrained"
            )
        if missing := sorted(found["missing_keys"]):
            raise ConfigError(
                f"rollout.reward_model.model_name={name}: its files lack {missing[0]}; give the "
                "folder of a whole model"
            )
        own_memory(model.to(self.device))
        self.model = model.eval()
        self.same_tokens = self.tokenizer.get_vocab() == tokenizer.get_vocab()

    async def judge(self, group: Group, engine: object) -> dict[str, list[float]]:
        """The score of each sample."""
        tokens = [self._tokens(sample) for sample in group.samples]
        return {"reward": await asyncio.to_thread(self.scores, tokens)}

    judge.fields = ("reward",)

    def scores(self, tokens: list[list[int]]) -> list[float]:
        """One score for each text, in batches of similar length."""
        pad = self.model.config.get_text_config().pad_token_id
        size = 1 if pad is None else self.config.batch_size  # transformers then takes one at a time
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        found = [0.0] * len(tokens)
        for start in range(0, len(order), size):
            some = order[start : start + size]
            longest = len(tokens[some[-1]])
            ids = [tokens[i] + (longest - len(tokens[i])) * [pad or 0] for i in some]
            mask = [[j < len(tokens[i]) for j in range(longest)] for i in some]
            with torch.inference_mode():
                logits = self.model(
                    input_ids=torch.tensor(ids, device=self.device),
                    attention_mask=torch.tensor(mask, device=self.device).long(),
                    use_cache=False,
                ).logits
            for i, score in zip(some, logits[:, 0].float().tolist(), strict=True):
                found[i] = score
        return found

    def _tokens(self, sample: Sample) -> list[int]:
        if self.same_tokens:
            return list(sample.sequences[-1]["token_ids"])
        prompt, answer = sample.turns[-1].state, sample.turns[-1].action
        if self.tokenizer.chat_template:
            talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            text = self.tokenizer.apply_chat_template(talk, tokenize=False)
            return self.tokenizer.encode(text, add_special_tokens=False)
        return self.tokenizer.encode(prompt + answer + (self.tokenizer.eos_token or ""))
