"""The training loop. All trainers share it; the config chooses source, algorithm and learners.

A step is `Trainer._learn` (collect a batch, compute the fields that it needs, add advantages,
update each learner) and `Trainer._serve` (publish the new weights, and evaluate).
"""

import logging
from collections.abc import Mapping

import torch
from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from RL2.distributed import Traffic, broadcast, rank, world_size
from RL2.distributed.agreement import all_or_none, check_same
from RL2.distributed.comm import Batch
from RL2.runtime.errors import TrainingError
from RL2.runtime.process_tree import reap_adopted
from RL2.runtime.stop import StopRequest
from RL2.trainer.checkpoints.export import files_beside_weights
from RL2.trainer.health import LLMKLAlarm
from RL2.trainer.run import Run, Start, claim_folder
from RL2.trainer.sinks.timers import Timers
from RL2.trainer.startup.banner import banner
from RL2.trainer.startup.ends import name_ends, name_padding
from RL2.trainer.startup.frozen import Provider
from RL2.trainer.startup.inputs import read_inputs
from RL2.trainer.startup.models import load_learners, load_providers, providers_of_tests
from RL2.trainer.startup.shared_folder import check_shared
from RL2.trainer.startup.started_with import file_facts
from RL2.trainer.startup.teacher import teacher_kl
from RL2.workers.evaluation import evaluate

logger = logging.getLogger(__name__)


class Trainer:
    """A run's parts, set up cheapest first, so that bad input stops the run before a model loads.

    Args:
        config: a composed, validated and resolved config.
        device: this rank's device.
        stop: the request to end early; None means never.

    Attributes:
        source: provides batches, and may serve the weights.
        algorithm: how the run learns from a batch.
        providers: the functions that compute fields for the algorithm, by name.
        test_providers: the same for evaluations.
        learners: the models that are trained, by name, in the order of their updates.
        references: the frozen models that may follow the actor, by name.
    """

    def __init__(self, config: DictConfig, device: torch.device, stop: StopRequest | None = None):
        self.config, self.device, self.stop = config, device, stop or StopRequest()
        self.timers, self.traffic = Timers(), Traffic()
        self.alarm = LLMKLAlarm(config)
        check_shared(config.trainer.save_dir)
        torch.manual_seed(config.trainer.seed + rank())

        inputs = all_or_none(lambda: read_inputs(config))
        self.algorithm, self.source = inputs.algorithm, inputs.source
        check_same(file_facts(config, inputs.fingerprints, self.source.datasets))
        n_steps = config.trainer.n_epochs * self.source.steps_per_epoch
        self.n_steps = min(n_steps, config.trainer.max_steps or n_steps)
        claimed = claim_folder(config, device, inputs.fingerprints)

        self.learners = load_learners(config, self.algorithm, device, self.traffic)
        actor = self.learners["actor"]
        if self.algorithm.loss.head == "scalar":
            name_padding(actor.hf_model, inputs.tokenizer, {*inputs.ends.ids, *self.source.end_ids})
        else:
            name_ends(actor.hf_model, inputs.ends.saved, inputs.missing_ends)
        files = all_or_none(lambda: files_beside_weights(actor, inputs.tokenizer))
        for learner in self.learners.values():
            learner.prepare_scheduler(self.n_steps * learner.updates_per_rollout)
        self.providers, self.references = load_providers(
            config, self.algorithm.needs, self.learners, device, self.traffic,
            keep=self.source.repeats and self.n_steps > self.source.steps_per_epoch,
            contexts=self.source.contexts, fingerprints=inputs.fingerprints,
        )  # fmt: skip
        self.test_providers = providers_of_tests(
            config, self.providers, self.learners, self.references
        )
        claimed[0].references = self.references
        self.source.start(device, actor.dtypes.compute)
        self.run = Run(
            config, device, self.stop, claimed, self.source, self.learners, files, self.n_steps,
            self.timers, self.traffic, self.providers.get("ref_logps"),
        )  # fmt: skip

    def train(self) -> None:
        """Train from where the run stands to the last step, and save the model to `final`.

        Raises:
            Interrupted, HealthError: the run was asked to stop, or is unhealthy. What it has
                learned is in a checkpoint.
        """
        start, save_freq = self.run.resume(), self.config.trainer.save_freq
        # Also at the start: servers may hold other weights, and a failed transfer must stop the run
        # before the first rollout. (An unfinished step publishes them when it is finished.)
        if start.unfinished is None:
            self._publish(start.step)
        if start.step > 0:
            self.traffic.pop()  # counted in no step
        self.run.open_folder(start)
        self.stop.call(self.source.interrupt)
        actor = self.learners["actor"]
        for line in banner(
            self.config, self.device, world_size(), actor.model.parameters(), actor.dtypes.compute,
            self.source, start.step, self.n_steps,
        ):  # fmt: skip
            logger.info("%s", line)
        with logging_redirect_tqdm(), self._bar(start.step) as bar:
            self._before_first_step(start)
            for step in range(start.step + 1, self.n_steps + 1):
                with self.timers("step"):
                    metrics = self._serve(step, self._learn(step))
                self._end_step(step, metrics)
                if save_freq is not None and step % save_freq == 0:
                    self.run.save(step, self.source.state_dict())
                bar.update()
        self.run.finish(max(start.step, self.n_steps))

    def _before_first_step(self, start: Start) -> None:
        """Finish a step that a stop left unfinished; evaluate the initial weights of a new run."""
        if start.unfinished is not None:
            self._end_step(start.step, self._serve(start.step, start.unfinished))
        elif start.step == 0:
            with self.run.save_if_interrupted(0):
                self.run.raise_if_stopped()
                metrics = self._evaluate(0)
            if metrics:
                self.run.log(0, metrics)

    def _learn(self, step: int) -> dict[str, float]:
        """Collect a batch and learn from it; returns the step's metrics."""
        before = self.run.position()
        with self.run.save_if_interrupted(step - 1, before), self.timers("rollout"):
            batch, metrics = self.source.collect(step, last=step == self.n_steps)
        batch = self._with_fields(batch, self.providers)
        metrics |= teacher_kl(batch)
        with self.run.save_if_update_fails(step - 1, before):
            batch = self._with_advantages(batch)
            for name, learner in self.learners.items():
                with self.timers(f"update_{name}"):
                    metrics |= learner.update(batch, step)
                    if name != "actor":  # which is published
                        learner.offload()
        for reference in self.references.values():
            reference.follow(self.learners["actor"], step)
        return metrics | self.alarm(metrics) | self.traffic.pop()

    def _with_fields(self, batch: Batch | None, providers: Mapping[str, Provider]) -> Batch | None:
        """Add the fields that the algorithm needs and no batch brings (a collective)."""
        for name, fields in self._fields_to_compute(batch).items():
            with self.timers(f"compute_{name}"):
                batch = providers[name](batch, fields)
        return batch

    def _fields_to_compute(self, batch: Batch | None) -> Mapping[str, Mapping[str, str]]:
        """What to compute for the algorithm; nothing if rank 0 has no batch (a collective)."""
        needs = self.algorithm.needs
        return {} if needs and broadcast(batch is None) else needs

    def _with_advantages(self, batch: Batch | None) -> Batch | None:
        """Add advantages on rank 0; if the estimator fails, all ranks raise (a collective)."""
        if self.algorithm.advantage is None:
            return batch
        fault = None
        try:
            batch = self.algorithm.advantages(batch)
        except TrainingError as error:
            fault = str(error)
        if fault := broadcast(fault):
            raise TrainingError(fault)
        return batch

    def _serve(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Publish the new weights and evaluate; returns all metrics of the step. A run that is
        stopped in here begins here when it resumes."""
        with self.run.save_if_interrupted(step, unfinished=metrics):
            with self.timers("rollout"):
                self.source.wait()
            self.run.raise_if_stopped()
            with self.timers("update_rollout"):
                self._publish(step)
            return metrics | self._evaluate(step)

    def _publish(self, step: int) -> None:
        """Publish the actor's weights if the source serves them, then offload all learners."""
        actor = self.learners["actor"]
        if self.source.serves(step):
            actor.load()
            self.source.publish(actor, step)
        for learner in self.learners.values():
            learner.offload()

    def _evaluate(self, step: int) -> dict[str, float]:
        if not self.source.evaluates(step):
            return {}
        # Not counted: what a reference says of these rows is not in checkpoints.
        with self.timers("evaluate"), self.traffic.paused():
            metrics = self.source.evaluate(step)
            batch = self._with_fields(self.source.test_batch(), self.test_providers)
            metrics |= evaluate(self.learners["actor"], self._with_advantages(batch))
            self.learners["actor"].offload()
        self.run.save_if_best(step, metrics)
        return metrics

    def _end_step(self, step: int, metrics: dict[str, float]) -> None:
        """Log a step, and stop a run that is unhealthy or cannot write."""
        self.run.log(step, metrics)
        reap_adopted()
        self.run.raise_if_unhealthy(step, metrics)

    def _bar(self, done: int) -> tqdm:
        return tqdm(
            total=self.n_steps, initial=done, desc="train", disable=rank() != 0, dynamic_ncols=True
        )

    def close(self) -> None:
        """Close the source and the run's folder."""
        self.source.close()
        self.run.close()
