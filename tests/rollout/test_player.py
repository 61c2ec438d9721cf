"""Whole conversations, cut off and moved at any point: what was sampled is what is trained on."""

import asyncio
import io
import json
import random
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig

from RL2.datasets.end_of_turn import end_tokens
from RL2.engines.protocol import Completion, SamplingParams
from RL2.environments.environment import Step, load_environment
from RL2.rollout.player import Gate, Player
from RL2.rollout.sample_table import SampleTable, to_batch
from RL2.rollout.samples import (
    NOT_THE_POLICY,
    Sample,
    Turn,
    stable_seed,
)
from RL2.runtime.errors import EngineError, EnvError
from tests.chat_templates import FAMILIES, KINDS, tokenizer_of
from tests.faults.support import points
from tests.prefix_tokenizers import PREFIX_TOKENIZERS
from tests.rollout.scripted_engine import ScriptedEngine
from tests.rollout.support import EOS, PAD, THINK_END, action_text

PER_CHUNK = 1000  # conversations; 100 chunks with RL2_FAULTS=long
TEXTS = [
    "",
    "ok",
    "a\n",
    "é",
    "日本",
    "<eos>",
    "<eos>\nmore",
    "</think>",
    "<pad>",
    "\x00",
    "ab" * 9,
]
STOPS = [(), ("ab",), ("aba", "b\na"), ("b\n", "é"), ("</think>",), ("<eos>",)]


@dataclass(frozen=True)
class Conversation:
    """What the policy, the environment and the trainer will do, all by `seed`.

    prompt: None where the environment's `reset` gives it. carries: what the environment's
    extra_info is: "plain", "bytes", or "opaque" for what no checkpoint holds.
    """

    seed: int
    prompt: str | None
    sampling: SamplingParams
    max_turns: int
    max_length: int | None
    carries: str

    @classmethod
    def random(cls, seed):
        rng = random.Random(seed)
        return cls(
            seed,
            prompt=rng.choice((None, "Q: ", "1 + 1 = ", "é<eos>\n")),
            sampling=SamplingParams(
                1.0,
                max_new_tokens=rng.randrange(1, 12),
                stop=rng.choice(STOPS),
                no_stop_trim=rng.random() < 0.5,
            ),
            max_turns=rng.randrange(1, 7),
            max_length=rng.choice((None, rng.randrange(15, 90))),
            carries=rng.choice(("plain", "plain", "bytes", "opaque")),
        )


# ------------------------------------------------------------------------ a policy

ALPHABET = list(range(3, 259)) + [EOS] * 40 + [THINK_END] * 8 + [PAD] * 2


def write(conversation, tokenizer):
    """A policy that never looks at a request's seed: the next token, its logp and its weight
    version follow from the tokens before it, so that a cut changes nothing."""
    letters = tokenizer.encode("aab\né", add_special_tokens=False)

    def next_token(ids):
        number = stable_seed(conversation.seed, len(ids), ids[-1])
        choices = letters if number % 5 else ALPHABET
        token = choices[number // 8 % len(choices)]
        return token, -(number % 1009) / 128, number % 7

    return next_token


def reason_to_end(ids, sampling, tokenizer):
    """Why an engine ends after `ids`, None if it goes on."""
    text = tokenizer.decode(ids) if sampling.stop else ""
    if ids[-1] == EOS or any(stop in text for stop in sampling.stop):
        return "stop"
    return "length" if len(ids) == sampling.max_new_tokens else None


class Author(ScriptedEngine):
    """Writes tokens as a policy does, some at a time, until it is done or aborted.

    answers: (prompt, most tokens, answer) of each request that was answered.
    """

    def __init__(self, next_token, tokenizer, rng):
        super().__init__(None)
        self.next_token, self.tokenizer, self.rng = next_token, tokenizer, rng
        self.aborts = 0
        self.answers = []

    async def generate(self, token_ids, sampling, *, seed):
        prompt, aborts = list(token_ids), self.aborts
        ids, logps, versions, reason = [], [], [], None
        while reason is None:
            if self.rng.random() < 0.4:
                await asyncio.sleep(0)
            if self.aborts != aborts:
                reason = "abort"
                break
            token, logp, version = self.next_token(prompt + ids)
            ids.append(token)
            logps.append(logp)
            versions.append(version)
            reason = reason_to_end(ids, sampling, self.tokenizer)
        if reason == "length" and self.rng.random() < 0.2:
            await asyncio.sleep(0)
            reason = "length" if self.aborts == aborts else "abort"
        answer = Completion(ids, logps, reason, versions)
        self.answers.append((prompt, sampling.max_new_tokens, answer))
        return answer

    async def abort(self):
        self.aborts += 1


# ------------------------------------------------------------------------ an environment


class Surroundings:
    """An environment that answers by the number of the turn, which is in extra_info alone."""

    path = "surroundings.py"

    def __init__(self, conversation, rng):
        self.conversation, self.rng = conversation, rng

    async def reset(self, extra_info, key=0):
        await self._think()
        return "R: ", self._carried(0)

    async def step(self, state, action, extra_info, key=0, finish_reason="stop"):
        await self._think()
        extra_info = json.loads(extra_info) if isinstance(extra_info, bytes) else extra_info
        return self.answer(state, action, extra_info["turn"])

    def answer(self, state, action, turn):
        rng = random.Random(stable_seed(self.conversation.seed, turn, 1))
        kind = rng.choice(["on"] * 24 + ["jump"] * 10 + ["done"] * 4 + ["raise", "silence"])
        if kind == "raise":
            raise EnvError("surroundings.py: step raised")
        text = {
            "on": state + action + rng.choice(TEXTS),
            "jump": rng.choice(TEXTS[1:]),
            "done": None,
            "silence": "",
        }[kind]
        reward = rng.choice((0.0, 1.0, -0.5, 0.25))
        return Step(text, 2 * reward, kind == "done", self._carried(turn + 1), reward)

    def _carried(self, turn):
        extra_info = {"turn": turn}
        if self.conversation.carries == "bytes":
            return json.dumps(extra_info).encode()
        return extra_info | (
            {"half": Fraction(1, 2)} if self.conversation.carries == "opaque" else {}
        )

    async def _think(self):
        for _ in range(self.rng.randrange(3)):
            await asyncio.sleep(0)


# ------------------------------------------------------------------------ playing


async def play(conversation, tokenizer):
    """Play a conversation, while its requests are cut off, and the sample goes through a file to
    another player, at points by its seed. Returns the sample and what its engines answered."""
    rng = random.Random(stable_seed(conversation.seed, 2))
    item = {"index": 0, "extra_info": {"answer": "5", "turn": 0}}
    if conversation.prompt is not None:
        item["prompt"] = conversation.prompt
    next_token = write(conversation, tokenizer)
    sample, answers = Sample(conversation.seed, 1, born=(2, 3)), []

    def begin(is_open=True):
        engine = Author(next_token, tokenizer, rng)
        engine.answers = answers
        gate = Gate(1)
        if not is_open:
            gate.close()
        player = Player(
            engine,
            Surroundings(conversation, rng),
            tokenizer,
            seed=5,
            max_turns=conversation.max_turns,
            max_length=conversation.max_length,
        )
        task = asyncio.create_task(
            player.play(sample, item, conversation.sampling, gate, train=True)
        )
        return engine, gate, task

    engine, gate, task = begin()
    for event in rng.choices(("cut", "move", "abort"), (8, 6, 0.3), k=rng.randrange(7)):
        for _ in range(rng.randrange(12)):
            await asyncio.sleep(0)
        if task.done():
            break
        if event == "cut":
            await gate.drain(engine)
        if event == "abort":  # nobody asked for it
            await engine.abort()
        if event == "move" or rng.random() < 0.3:
            state = sample.state_dict()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            if "turns" not in state:
                answers.clear()  # it begins again
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            sample = Sample.from_state_dict(sample.position, torch.load(file, weights_only=True))
            if sample.ended:  # meanwhile
                break
            engine, gate, task = begin(gate.is_open)
        if not gate.is_open:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            gate.open()
    if not sample.ended:
        await task
    return sample, answers


def told(conversation, tokenizer):
    """What must come out, told turn by turn without parts and moves: yields
    (sequences, turn, prompt, action) after each action, with rows (token, whether the policy wrote
    it, logp, reward, weight version) in the sequences; the turn is None where it failed."""
    sampling, surroundings = conversation.sampling, Surroundings(conversation, None)
    next_token = write(conversation, tokenizer)

    def given(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        return [(token, False, 0.0, 0.0, NOT_THE_POLICY) for token in ids]

    state = conversation.prompt or "R: "
    sequences = [given(state)]
    for turn in range(conversation.max_turns):
        prompt, ids, rows, reason = [row[0] for row in sequences[-1]], [], [], None
        while reason is None:
            token, logp, version = next_token(prompt + ids)
            ids.append(token)
            rows.append((token, True, logp, 0.0, version))
            reason = reason_to_end(ids, sampling, tokenizer)
        sequences[-1] += rows
        action = action_text(Completion(ids, [], reason, []), sampling, tokenizer)
        try:
            answer = surroundings.answer(state, action, turn)
        except EnvError:
            answer = None
        ends = answer is not None and (answer.done or turn + 1 == conversation.max_turns)
        if answer is None or (not ends and not answer.next_state):
            yield sequences, None, prompt, ids
            return
        sequences[-1][-1] = (*rows[-1][:3], answer.reward, rows[-1][4])
        said = Turn(state, action, len(ids), reason, answer.reward, answer.score)
        if ends:
            yield sequences, said, prompt, ids
            return
        goes_on, next_state = answer.next_state.startswith(state + action), answer.next_state
        if goes_on:
            # What an environment writes behind an action follows what the policy wrote, whose
            # stop text it may not have been shown, and may have written once more.
            added = answer.next_state[len(state + action) :]
            hidden = "" if ids[-1] == EOS else tokenizer.decode(ids).removeprefix(action)
            for echo in (hidden, *(stop for stop in sampling.stop if hidden.startswith(stop))):
                if added.startswith(echo):
                    added = added.removeprefix(echo)
                    break
            next_state = state + action + hidden + added
        new = given(added if goes_on else next_state)
        if goes_on and reason == "stop" and new and new[0][0] == ids[-1] and ids[-1] in (EOS, PAD):
            new = new[1:]
        length = len(new) + goes_on * len(sequences[-1]) + sampling.max_new_tokens
        if conversation.max_length is not None and length > conversation.max_length:
            yield sequences, said, prompt, ids
            return
        yield sequences, said, prompt, ids
        if goes_on:
            sequences[-1] += new
        else:
            sequences.append(new)
        state = next_state


def rows_of(sequence):
    names = ("token_ids", "action_mask", "llm_logps", "rewards", "weight_versions")
    return list(zip(*(sequence[name] for name in names), strict=True))


def check(conversation, tokenizer, sample, answers):
    answers, turns, sequences = iter(answers), [], None
    for told_sequences, turn, prompt, ids in told(conversation, tokenizer):
        written = []
        for request, most, part in answers:
            # The engine is asked to go on with exactly what there is.
            assert request == prompt + written
            assert most == conversation.sampling.max_new_tokens - len(written)
            written += part.token_ids
            if len(written) >= len(ids):
                break
        if sample.cause == "abort" and len(turns) == len(sample.turns):
            told_sequences[-1] = told_sequences[-1][: len(prompt)]
            break
        # What comes after a stop string that a cut had torn in two is thrown away, nothing else.
        assert written[: len(ids)] == ids
        assert written == ids or (turn is None or turn.finish_reason == "stop")
        if turn is None:
            assert sample.cause == "env"
            break
        turns.append(turn)
    else:
        assert sample.error is None
    sequences = told_sequences
    assert next(answers, None) is None  # everything that was sampled has been told
    assert sample.ended and sample.turns == turns
    assert [rows_of(sequence) for sequence in sample.sequences] == sequences


def check_batch(samples):
    batch = to_batch(SampleTable.of(samples, lines=True).good(), n_responses=2)
    good = [sample for sample in samples if sample.error is None]
    rows = [(sample, rows_of(sequence)) for sample in good for sequence in sample.sequences]
    assert len(batch["states"]) == len(rows)
    for i, (sample, sequence) in enumerate(rows):
        row = {name: values[i] for name, values in batch.items()}
        ids, mask, n = [token for token, *_ in sequence], row["action_mask"], len(sequence) - 1
        assert row["sample_ids"] == 2 * sample.position + 1 and row["lengths"] == n
        assert row["states"].tolist()[:n] == ids[:-1] and row["actions"].tolist()[:n] == ids[1:]
        assert not mask[n:].any() and row["rewards"][~mask].count_nonzero() == 0
        wrote = [columns for columns in sequence if columns[1]]
        for column, name in {
            0: "actions",
            2: "llm_logps",
            3: "rewards",
            4: "weight_versions",
        }.items():
            assert row[name][mask].tolist() == [columns[column] for columns in wrote], name


@pytest.mark.parametrize("chunk", points(1, 100))
def test_what_was_sampled_is_what_is_trained_on(chunk, byte_tokenizer):
    async def play_all():
        for seed in range(chunk * PER_CHUNK, (chunk + 1) * PER_CHUNK):
            conversation = Conversation.random(seed)
            sample, answers = await play(conversation, byte_tokenizer)
            try:
                check(conversation, byte_tokenizer, sample, answers)
            except BaseException as error:
                raise AssertionError(f"{conversation}") from error
            samples.append(sample)

    samples = []
    asyncio.run(play_all())
    check_batch(samples)


def test_a_state_without_a_token_ends_its_sample_by_name(tmp_path, byte_tokenizer):
    path = tmp_path / "env.py"
    path.write_text(
        "async def step(state, action, extra_info):\n"
        "    return {'next_state': '', 'reward': 1.0, 'score': 1.0, 'done': False}\n"
    )
    engine = ScriptedEngine(lambda *_: Completion([70, EOS], [-1.0, -1.0], "stop", [0, 0]))

    def play(max_turns):
        sample, player = Sample(0, 0, born=(0, 0)), Player(
            engine, load_environment(path), byte_tokenizer,
            seed=0, max_turns=max_turns, max_length=None,
        )  # fmt: skip
        playing = player.play(sample, {"prompt": "Q"}, SamplingParams(1.0, 4), Gate(1), train=True)
        asyncio.run(playing)
        return sample

    assert play(max_turns=1).error is None  # nobody reads the state
    sample = play(max_turns=2)
    assert (sample.cause, len(engine.calls)) == ("env", 2)
    assert sample.error == (
        f"{path}: step returned next_state='', which has no tokens, and done=False; "
        "return text to go on with, or done=True"
    )
    assert sample.sequences[0]["token_ids"][-2:] == [70, EOS]  # what was judged


# ------------------------------------------------------------------------ where a turn ends


class Tells:
    """An environment that goes on with `tell(state, action)`, and keeps what it was shown."""

    path = "tells.py"

    def __init__(self, tell):
        self.tell, self.shown = tell, []

    async def step(self, state, action, extra_info, key=0, finish_reason="stop"):
        self.shown.append((state, action))
        return Step(self.tell(state, action), 0.0, False, extra_info, 0.0)


def play_turns(tokenizer, writes, tell, sampling, prompt="Q: ", ends=None):
    """A sample whose policy writes these texts, one a turn, ended as `sampling` says; with what the
    environment was shown."""
    left = iter(writes)
    engine = ScriptedEngine(lambda *_: _written(tokenizer, next(left)))
    environment = Tells(tell)
    player = Player(
        engine, environment, tokenizer, seed=0, max_turns=len(writes), max_length=None, ends=ends
    )
    sample = Sample(0, 0, born=(0, 0))
    asyncio.run(player.play(sample, {"prompt": prompt}, sampling, Gate(1), train=True))
    assert sample.error is None
    assert all(call[1].stop_token_ids == player.ends.ids for call in engine.calls)
    return sample, environment.shown


def _written(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    return Completion(ids, [-1.0] * len(ids), "stop", [0] * len(ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_end_of_turn_is_shown_to_nobody_and_stands_once(name, kind):
    """The environment closes a turn as the chat template does."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, kind)
    first = [{"role": "user", "content": "what is it ?"}]
    later = {"role": "user", "content": "and ?"}

    def render(messages, generate=True):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
        )

    answer = {"role": "assistant", "content": "X"}
    behind = render([*first, answer, later]).rpartition("X")[2]
    if name == "harmony":  # which closes earlier turns in another way
        behind = behind.replace("<|end|>", "<|return|>", 1)
    within = "<|END_RESPONSE|>" if name == "command" else ""
    said = [f"{word}{within}{family.end}" for word in ("#### 42", "forty-", "two")]
    sample, shown = play_turns(
        tokenizer, said, lambda state, action: state + action + behind.removeprefix(within),
        SamplingParams(1.0, 99), prompt=render(first),
    )  # fmt: skip
    # A tokenizer of words puts spaces where it likes.
    assert [turn.action.replace(" ", "") for turn in sample.turns] == [
        f"{word}{within}" for word in ("####42", "forty-", "two")
    ]
    (sequence,) = sample.sequences
    (end,) = tokenizer.convert_tokens_to_ids([family.end])
    ids, mask = sequence["token_ids"], sequence["action_mask"]
    wrote = [
        i for i, (token, own) in enumerate(zip(ids, mask, strict=True)) if own and token == end
    ]
    assert len(wrote) == 3
    assert all(ids[i + 1] != end for i in wrote[:-1])
    if kind == "bytes":  # elsewhere text does not come back from tokens as it was
        assert tokenizer.decode(ids) == shown[2][0] + shown[2][1] + family.end


def test_several_ends_of_one_model(byte_tokenizer):
    """Whatever the generation config names ends a turn, special or not."""
    dot = byte_tokenizer.encode(".")[0]
    ends = end_tokens(byte_tokenizer, GenerationConfig(eos_token_id=[dot, PAD]))
    assert ends.ids == (dot, PAD, EOS)
    writes = ["a.", "b<pad>", "c<eos>", "d</think>"]
    sample, shown = play_turns(
        byte_tokenizer, writes, lambda state, action: f"{state}{action}.\n", SamplingParams(1.0, 9),
        ends=ends,
    )  # fmt: skip
    assert [turn.action for turn in sample.turns] == ["a", "b", "c", "d</think>"]
    (sequence,) = sample.sequences
    assert byte_tokenizer.decode(sequence["token_ids"]) == "Q: a.\nb<pad>.\nc<eos>.\nd</think>"


@pytest.mark.parametrize("no_stop_trim", [True, False])
@pytest.mark.parametrize(
    ("stop", "writes", "tell", "text"),
    [
        # An environment puts back what was cut off, or does not: the tokens say the same.
        (";", "search cats;", "; found 3\n", "search cats; found 3\n"),
        (";", "search cats;", " found 3\n", "search cats; found 3\n"),
        (
            "</search>",
            "<search>cats</search>",
            "</search><result>3",
            "<search>cats</search><result>3",
        ),
        ("</search>", "<search>cats</search>", "<result>3", "<search>cats</search><result>3"),
        ("\n", "Act: f\n", "\nObs: 3\n", "Act: f\nObs: 3\n"),
        ("<pad>", "cats<pad>", "<pad>3 ", "cats<pad>3 "),
        ("<pad>", "cats<pad>", "3 ", "cats<pad>3 "),
    ],
)
def test_a_state_says_what_the_tokens_say(byte_tokenizer, stop, writes, tell, text, no_stop_trim):
    shows = no_stop_trim and stop != "<pad>"  # made of special tokens: never shown

    def answer(state, action):
        return state + action + (tell.removeprefix(stop) if shows else tell)

    sampling = SamplingParams(1.0, 99, (stop,), no_stop_trim)
    sample, shown = play_turns(byte_tokenizer, [writes] * 3, answer, sampling)
    assert [action for _, action in shown] == [writes if shows else writes.removesuffix(stop)] * 3
    assert [state for state, _ in shown] == ["Q: ", "Q: " + text, "Q: " + text * 2]
    (sequence,) = sample.sequences
    ids = sequence["token_ids"]
    assert byte_tokenizer.decode(ids) == "Q: " + text * 2 + writes


def test_a_stop_text_within_a_token(tiny_tokenizer):
    """What its last token says behind a stop text stays in the state."""
    content = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"][";!"] = 300
    content["model"]["merges"] = [[";", "!"]]
    tokenizer = type(tiny_tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    sampling = SamplingParams(1.0, 99, (";",), no_stop_trim=False)
    for told in ("; found\n", " found\n", ";! found\n"):
        sample, shown = play_turns(
            tokenizer, ["cats;!"] * 2, lambda state, action, t=told: state + action + t, sampling
        )
        assert shown == [("Q: ", "cats"), ("Q: cats;! found\n", "cats")]
        assert tokenizer.decode(sample.sequences[0]["token_ids"]) == "Q: cats;! found\ncats;!"


class Counts:
    """An environment of three turns, each with a reward, that keeps the finish reasons."""

    path = "counts.py"

    def __init__(self):
        self.reasons = []

    async def step(self, state, action, extra_info, key=0, finish_reason="stop"):
        self.reasons.append(finish_reason)
        turn = len(self.reasons)
        return Step(state + action + ".", 1.0, turn == 3, extra_info, float(turn))


@pytest.mark.parametrize("truncated", ["keep", "mask", "zero"])
@pytest.mark.parametrize("cut_at", [0, 1, 2, None])
def test_a_sample_is_cut_off_if_any_turn_is(byte_tokenizer, truncated, cut_at):
    replies = iter(range(3))

    def reply(*_):
        reason = "length" if next(replies) == cut_at else "stop"
        return Completion([70], [-1.0], reason, [0])

    environment, sample = Counts(), Sample(0, 0, born=(0, 0))
    player = Player(
        ScriptedEngine(reply), environment, byte_tokenizer,
        seed=0, max_turns=5, max_length=None, truncated=truncated,
    )  # fmt: skip
    asyncio.run(player.play(sample, {"prompt": "Q"}, SamplingParams(1.0, 1), Gate(1), train=True))
    was_cut = cut_at is not None
    assert environment.reasons == ["length" if i == cut_at else "stop" for i in range(3)]
    assert sample.reward == (0.0 if was_cut and truncated == "zero" else 6.0)
    assert sum(sample.sequences[0]["rewards"]) == sample.reward
    assert sample.score == 3.0
    assert sample.masked == (was_cut and truncated == "mask")
    again = Sample.from_state_dict(0, sample.state_dict())
    assert (again.masked, again.reward) == (sample.masked, sample.reward)


@pytest.mark.parametrize("kind", PREFIX_TOKENIZERS)
def test_what_the_environment_adds_begins_with_no_space_of_the_tokenizers_own(tmp_path, kind):
    path = tmp_path / "env.py"
    path.write_text(
        "async def step(state, action, extra_info):\n"
        "    return {'next_state': state + action + 'yes?', 'reward': 1.0, 'score': 1.0,\n"
        "            'done': False}\n"
    )
    tokenizer = PREFIX_TOKENIZERS[kind]()
    whole = tokenizer("2+2=4yes?4", add_special_tokens=False)["input_ids"]
    engine = ScriptedEngine(lambda *_: Completion(whole[-1:], [-1.0], "length", [0]))
    sample, player = Sample(0, 0, born=(0, 0)), Player(
        engine, load_environment(path), tokenizer, seed=0, max_turns=2, max_length=None
    )  # fmt: skip
    playing = player.play(sample, {"prompt": "2+2="}, SamplingParams(1.0, 1), Gate(1), train=True)
    asyncio.run(playing)
    assert sample.error is None and sample.sequences[0]["token_ids"] == whole


class Breaks:
    async def generate(self, token_ids, sampling, *, seed):
        return 1 / 0


def test_an_engine_that_raises_is_told_with_its_place(byte_tokenizer):
    player = Player(Breaks(), None, byte_tokenizer, seed=0, max_turns=1, max_length=None)
    with pytest.raises(EngineError) as caught:
        asyncio.run(player._generate([1], SamplingParams(1.0, 4), 0))
    assert str(caught.value).startswith(
        "Breaks.generate raised ZeroDivisionError: division by zero (test_player.py:"
    )
