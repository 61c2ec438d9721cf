"""A server in a few lines, for the faults that a real one has only by accident.

    python scripted_server.py <port> <state folder>

It answers /generate with tokens that are a function of prompt, seed and weights, so that a test
sees which weights answered. Files in the state folder say what goes wrong: `reply` (a JSON list of
answers that come first; "hang", "exit", "500" or a raw text), `slow` (seconds for an answer),
`no_start` (exit at once), `deaf` (a weight update is acknowledged but not done), `sick` (the
process of that id answers with 500, to health checks as well).
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from aiohttp import web

port, folder = int(sys.argv[1]), Path(sys.argv[2])
state = {
    "weights": 0.0, "version": None, "paused": asyncio.Event(), "abort": asyncio.Event(),
    "asleep": False,
}  # fmt: skip


def answer(body: dict, count: int, finish: str) -> dict:
    base = sum(body["token_ids"]) + body["seed"]
    tokens = [(base + i) % 97 for i in range(count)]
    return {"tokens": tokens, "logps": [-state["weights"]] * count, "finish": finish}


def scripted() -> str | None:
    path = folder / "reply"
    if not path.exists():
        return None
    replies = json.loads(path.read_text())
    first, rest = replies[0], replies[1:]
    path.write_text(json.dumps(rest)) if rest else path.unlink()
    return first


@web.middleware
async def authorised(request: web.Request, handler):
    if request.path != "/health" and request.headers.get("key") != os.environ["SCRIPTED_KEY"]:
        return web.Response(status=401, text="no key")
    return await handler(request)


def sick() -> bool:
    path = folder / "sick"
    return path.exists() and path.read_text() == str(os.getpid())


async def health(request: web.Request) -> web.Response:
    return web.Response(status=500 if sick() else 200)


async def generate(request: web.Request) -> web.Response:
    body = await request.json()
    with (folder / "requests").open("a") as file:
        file.write(f"{os.getpid()} {body['seed']}\n")
    special = scripted()
    if special == "exit":
        os._exit(7)
    if special == "500" or sick() or state["asleep"]:
        return web.Response(status=500, text="cannot")
    if special == "hang":
        await asyncio.sleep(3600)
    if special is not None:
        return web.Response(text=special, content_type="application/json")
    slow = folder / "slow"
    if slow.exists():
        aborted = asyncio.create_task(state["abort"].wait())
        await asyncio.wait([aborted], timeout=float(slow.read_text()))
        if aborted.done():
            return web.json_response(answer(body, 1, "abort"))
        aborted.cancel()
    while state["paused"].is_set():
        await asyncio.sleep(0.02)
    return web.json_response(answer(body, body["max_new_tokens"], "length"))


async def pause(request: web.Request) -> web.Response:
    state["paused"].set()
    return web.Response()


async def resume(request: web.Request) -> web.Response:
    state["paused"].clear()
    return web.Response()


async def abort(request: web.Request) -> web.Response:
    state["abort"].set()
    state["abort"] = asyncio.Event()
    return web.Response()


async def sleep(request: web.Request) -> web.Response:
    state["asleep"] = True
    return web.Response()


async def wake(request: web.Request) -> web.Response:
    """As with real servers, waking starts one that was paused."""
    state["asleep"] = False
    state["paused"].clear()
    return web.Response()


async def load(request: web.Request) -> web.Response:
    body = await request.json()
    if not (folder / "deaf").exists():
        state.update(weights=body["weights"], version=body["version"])
    return web.Response()


async def held(request: web.Request) -> web.Response:
    about = {"weights": state["weights"], "version": state["version"]}
    if request.path == "/state":
        about |= {"asleep": state["asleep"], "paused": state["paused"].is_set()}
    return web.json_response(about)


if (folder / "no_start").exists():
    sys.exit("no_start was asked for")
app = web.Application(middlewares=[authorised])
app.add_routes(
    [web.get("/health", health), web.post("/generate", generate), web.post("/pause", pause),
     web.post("/resume", resume), web.post("/abort", abort), web.post("/load", load),
     web.get("/held", held), web.get("/state", held), web.post("/sleep", sleep),
     web.post("/wake", wake)]
)  # fmt: skip
sys.stdout.write(f"scripted server on {port}\n")
sys.stdout.flush()
web.run_app(app, host="127.0.0.1", port=port, print=None)
