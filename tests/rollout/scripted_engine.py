"""Engines that implement the protocol and do what a test tells them, when it tells them.

They stand in for no part of the library: they drive the collector through timing and faults that
a real engine shows only by chance.
"""

import asyncio
import random

from RL2.engines.protocol import Completion


class ScriptedEngine:
    """Answers with `reply(token_ids, sampling, seed)`, a Completion or an exception to raise.

    Each answer takes a random number of turns of the event loop, by `jitter`.
    """

    context_length = None
    weight_version = 0

    def __init__(self, reply, jitter=None):
        self.reply = reply
        self.random = None if jitter is None else random.Random(jitter)
        self.calls = []
        self.open = self.most_open = 0
        self.aborting = asyncio.Event()
        self.log = []

    async def start(self, settled=None):
        self.log.append("start")

    async def generate(self, token_ids, sampling, *, seed):
        self.calls.append((list(token_ids), sampling, seed))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            for _ in range(self.random.randrange(50) if self.random else 1):
                await asyncio.sleep(0)
            answer = self.reply(token_ids, sampling, seed)
        finally:
            self.open -= 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def update_weights(self, named_tensors, version):
        for _ in named_tensors:
            pass
        self.weight_version = version
        self.log.append(f"weights {version}")

    async def abort(self):
        self.log.append("abort")

    def metrics(self):
        return {"rollout/scripted": float(len(self.calls))}

    async def sleep(self):
        self.log.append("sleep")

    async def wake(self):
        self.log.append("wake")

    async def healthy(self):
        return True

    async def close(self):
        self.log.append("close")


class Typist(ScriptedEngine):
    """Writes the text that `text(prompt)` gives, one byte a turn of the event loop, and ends with
    the end token. A request whose prompt holds the beginning of it goes on there.

    tokenizer: encodes single characters. `prompt` ends with the character ":".
    """

    def __init__(self, text, tokenizer, eos):
        super().__init__(None)
        self.text, self.tokenizer, self.eos = text, tokenizer, eos
        self.aborts = 0

    async def generate(self, token_ids, sampling, *, seed):
        self.calls.append((list(token_ids), sampling, seed))
        prompt, _, begun = self.tokenizer.decode(token_ids).rpartition(":")
        whole = self.tokenizer.encode(self.text(prompt)) + [self.eos]
        rest = whole[len(begun) :]
        written, aborts = [], self.aborts
        while True:
            await asyncio.sleep(0)
            if self.aborts != aborts:
                reason = "abort"
                break
            written.append(rest[len(written)])
            text = self.tokenizer.decode(written)
            if written[-1] == self.eos or any(stop in text for stop in sampling.stop):
                reason = "stop"
                break
            if len(written) == sampling.max_new_tokens:
                reason = "length"
                break
        n = len(written)
        return Completion(written, [-1.0] * n, reason, [self.weight_version] * n)

    async def abort(self):
        self.aborts += 1
        self.log.append("abort")
