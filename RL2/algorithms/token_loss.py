"""From a loss's name or file to a function that the actor can call.

The signature of a token loss declares what it needs: see `RL2.algorithms.losses`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from RL2.algorithms import contract, estimator_trial
from RL2.algorithms.estimator import Estimator
from RL2.algorithms.losses import LOSSES
from RL2.algorithms.parameters import (
    DATA_FIELDS,
    ESTIMATOR_FIELDS,
    FIELDS,
    HEADS,
    LEARNED,
    bind_options,
    did_you_mean,
    import_function,
    parameters_of,
)
from RL2.algorithms.segments import SEGMENTS, Pairs, Segments
from RL2.algorithms.trial import kind_of, try_out
from RL2.config.elsewhere import value_here
from RL2.runtime.errors import ConfigError


@dataclass(frozen=True)
class TokenLoss:
    """A loss with its options bound, and the inputs that it needs.

    `inputs` are the names of its tensors in the order in which the function takes them. `top_k` is
    how many columns of `top_logps` it wants, which its option `max_rank` says; 0 without them.
    `origin` is the key and value that chose it. `draws`: whether it was seen to draw random
    numbers. `kind`: what it returns one value for, a key of `RL2.algorithms.segments.KINDS`.
    `selection` makes its input `selected` from the whole optimizer batch, if it names that.
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    top_k: int = 0
    origin: str = "actor.loss"
    draws: bool = False
    kind: str | None = "tokens"
    selection: Estimator | None = None

    @property
    def statistics(self) -> tuple[str, ...]:
        """The inputs that the head computes: token statistics, or `values`."""
        return tuple(name for name in self.inputs if name in LEARNED)

    @property
    def head(self) -> str:
        """The head that computes them, a key of `RL2.algorithms.parameters.HEADS`."""
        return next(name for name, own in HEADS.items() if {*self.statistics} <= {*own})

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the batch that it needs: inputs, and the tokens of `at_logps`."""
        named = tuple(name for name in self.inputs if name not in (*LEARNED, *SEGMENTS))
        tokens = ("teacher_top_ids",) if "at_logps" in self.inputs else ()
        return tuple(dict.fromkeys((*named, *tokens)))

    @property
    def segments(self) -> tuple[str, ...]:
        """Those of `sequences`, `groups` and `pairs` that must not be cut; none for a loss of
        single tokens."""
        named = tuple(name for name in self.inputs if name in SEGMENTS)
        return named and tuple(dict.fromkeys(("sequences", *named)))

    @property
    def uses_advantages(self) -> bool:
        """Whether the loss takes the advantages."""
        return "advantages" in self.inputs

    @property
    def is_multiplied(self) -> bool:
        """Whether the advantages multiply the loss, as it is a policy's and does not take them
        itself. A group or a pair has none of its own."""
        is_policy = self.head == "token_stats"
        return is_policy and not self.uses_advantages and self.kind in ("tokens", "sequences")

    def __call__(
        self, tensors: Mapping[str, Tensor | Segments | Pairs]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses and metrics `{name: metric}`, one value per element of the `kind`, from (at least)
        the `inputs` by name, each `[N]`, or `[N, K]` where it has several numbers per token, and
        the `segments`.

        Raises:
            Unfit: see `RL2.algorithms.contract.call`.
        """
        given = {name: tensors[name] for name in self.inputs}
        return contract.call(self.function, given, self.kind)


def resolve_loss(
    loss_config: Mapping[str, Any],
    fallbacks: Mapping[str, Any] | None = None,
    brought: Collection[str] = (),
) -> TokenLoss:
    """The loss that `actor.loss` names.

    Args:
        loss_config: the node. `import_path`, if not null, is a function in a file or module
            (`my_loss.py:my_loss`, `package.module:my_loss`), else `name` is a key of `LOSSES`.
            Every other entry that is not null, and every entry of the mapping `options`, must be
            a keyword-only parameter of the function, and is bound.
        fallbacks: values for options that the configuration leaves open, such as `actor.clip`
            for both clips; those that the function does not take are ignored.
        brought: fields `[B, T]` of the run's batches besides `FIELDS`, which it may name as well.

    The loss is tried on made-up tokens, so that one that cannot train is found here and not after
    the first rollout (`RL2.algorithms.trial`).

    Raises:
        ConfigError: unknown name, missing file, module or function, a parameter that is neither
            statistic nor field, an option that the function does not take, an option without
            value, `top_logps` without a `max_rank` of 1 or more, or a trial that raises, does not
            return one value per token (or sequence, group, pair), has no gradient, or gives numbers
            that are not finite.
    """
    if OmegaConf.is_config(loss_config):
        loss_config = OmegaConf.to_container(loss_config, resolve=True)
    options = {key: value for key, value in loss_config.items() if value is not None}
    name, import_path = options.pop("name", None), options.pop("import_path", None)
    extra = options.pop("options", {})

    if import_path is not None:
        origin = f"actor.loss.import_path={import_path}"
        function = import_function(import_path, origin)
        name = getattr(function, "__name__", import_path.rpartition(":")[2])
    else:
        origin = f"actor.loss.name={name}"
        if name not in LOSSES:
            here = value_here("loss.name", name)
            hint = f"{here}; " if here else did_you_mean(name, LOSSES)
            raise ConfigError(
                f"{origin}: unknown; {hint}use {', '.join(LOSSES)}, "
                "or actor.loss.import_path=my_loss.py:my_loss for your own"
            )
        function = LOSSES[name]

    select = getattr(function, "select", None)
    selected = ("selected",) if select is not None else ()
    known = tuple(dict.fromkeys((*LEARNED, *FIELDS, *DATA_FIELDS, *selected, *brought, *SEGMENTS)))
    kinds = "neither a token statistic nor a batch field"
    inputs, defaults = parameters_of(function, known, origin, "loss", kinds)
    learned = [name for name in inputs if name in LEARNED]
    if not learned:
        raise ConfigError(
            f"{origin}: takes no token statistic, so nothing can be trained; "
            f"name at least one of {', '.join(LEARNED)} as a parameter"
        )
    if not any({*learned} <= {*own} for own in HEADS.values()):
        raise ConfigError(
            f"{origin}: takes {' and '.join(learned)}, but a model gives either values or token "
            "statistics; name those of one (what a critic said before its update is old_values)"
        )
    of_selection, selection_options = (), {}
    if select is not None:
        fields = tuple(dict.fromkeys((*ESTIMATOR_FIELDS, "advantages", *brought)))
        of_selection, selection_options = parameters_of(
            select, fields, f"{origin}: select", "selection", "no field of a batch"
        )
    all_defaults = selection_options | defaults
    bound = bind_options(all_defaults, options, extra, origin, "actor.loss", fallbacks)
    own = {key: value for key, value in bound.items() if key in defaults}
    top_k = _columns(defaults | own, origin) if "top_logps" in inputs else 0
    selection = None
    if select is not None:
        options = {key: value for key, value in bound.items() if key in selection_options}
        selection = Estimator(name, partial(select, **options), of_selection, origin, "selections")
        estimator_trial.try_out(selection, select, origin)
    loss = TokenLoss(name, partial(function, **own), inputs, top_k, origin, selection=selection)
    if loss.segments:
        of_any = replace(loss, kind=None)
        loss = replace(loss, kind=kind_of(of_any, inputs, loss.statistics, top_k, origin))
    draws = try_out(loss, function, inputs, loss.statistics, top_k, origin)
    return replace(loss, draws=draws)


def _columns(options: Mapping[str, Any], origin: str) -> int:
    """How many columns of `top_logps` a loss wants: its option `max_rank`."""
    if "max_rank" not in options:
        raise ConfigError(
            f"{origin}: takes top_logps without saying how many of them; give it an option such "
            "as max_rank=8 after a lone *"
        )
    max_rank = options["max_rank"]
    if not isinstance(max_rank, int) or isinstance(max_rank, bool) or max_rank < 1:
        raise ConfigError(
            f"{origin}: its option max_rank={max_rank} must be a whole number, 1 or more"
        )
    return max_rank
