"""What is a secret, and text without it."""

import json
import logging
import sys
import time
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml

from RL2.runtime.secrets import (
    RedactingFormatter,
    for_terminal,
    is_secret_name,
    redact,
    redact_all,
    redact_config,
)

CANARY = "canary-4f1b9c"
REAL = Path(__file__).parents[3] / "shared/data/gsm8k"


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY", "HF_TOKEN", "RL2_SERVER_KEY", "DB_PASSWORD", "--api-key", "options.secret",
        "PGPASSWORD", "MYSQL_PWD", "DB_PASS", "GITHUB_PAT", "GPG_PASSPHRASE", "API_KEYS", "MYTOKEN",
        "SENTRY_DSN", "DATABASE_URL", "SECRET_KEY_BASE", "DB_PASSWD_OLD", "HTTP_AUTH", "APIKEY",
        "AZURE_CONNECTION_STRING", "SLACK_WEBHOOK_URL", "AWS_SECRET_ACCESS_KEY", "SESSION_COOKIE",
        "API_TOKENS", "API_KEY_2", "TOKEN_1", "HF_TOKEN_READ", "DBPASS", "DB_PW", "LDAP_BINDPW",
        "JUDGE_BEARER", "AUTH_HEADER",
    ],
)  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "max_new_tokens", "TOKENIZERS_PARALLELISM", "KEYBOARD", "SSH_AUTH_SOCK", "actor.lora.alpha",
        "PWD", "OLDPWD", "PATH", "XAUTHORITY", "AWS_ACCESS_KEY_ID", "PAD_TOKEN", "AUTHOR", "PASSED",
        "loss.options.prompt_tokens", "tokenizer.eos_token", "COMPASS", "BYPASS", "TOKENS_2",
    ],
)  # fmt: skip
def test_names_of_none(name):
    assert not is_secret_name(name)


def test_values_of_secret_variables(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    monkeypatch.setenv("SOME_TOKEN", CANARY + "-and-more")  # holds the other one
    monkeypatch.setenv("SHORT_KEY", "train")
    assert redact(f"a {CANARY}-and-more b {CANARY} train") == "a *** b *** train"
    assert redact("x of-the-child", {"THEIR_KEY": "of-the-child"}) == "x ***"


def test_keys_of_our_own_are_none():
    def names(node):
        for name, value in node.items():
            yield name
            if isinstance(value, dict):
                yield from names(value)

    for path in Path("RL2/trainer/config").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        assert not [name for name in names(config) if is_secret_name(str(name))]


def test_values_however_they_are_written(monkeypatch):
    """JSON, Python and addresses have escapes; logs show one line of many."""
    value = 'with "quotes", back\\slash/é\nand a second line'
    monkeypatch.setenv("SOME_PASSWORD", value)
    twice = json.dumps(json.dumps(value))
    for text in (value, json.dumps(value), repr(value), quote(value, safe=""), "and a second line",
                 quote(value, safe="").lower(), value.encode().hex()):  # fmt: skip
        assert set(redact(text)) <= set("*\"'"), text
    assert redact(twice) == '"\\"***\\""'


@pytest.mark.parametrize("before", ["", "u:", "user:", "a-user:"])
def test_values_within_base64(monkeypatch, before):
    monkeypatch.setenv("SOME_PASSWORD", CANARY)
    encoded = b64encode(f"{before}{CANARY}".encode()).decode()
    assert len(redact(f"sent {encoded}")) < len(f"sent {encoded}") - len(CANARY) + 3


def test_the_password_of_a_variable_that_is_an_address(monkeypatch):
    monkeypatch.setenv("ANY_NAME", "postgres://me:p@ss/w0rd-1@db.example:5432/runs")
    assert redact("authentication failed with p@ss/w0rd-1 at db.example") == (
        "authentication failed with *** at db.example"
    )


def test_several_in_one_variable(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEYS", f"{CANARY}-1, {CANARY}-2")
    assert redact(f"401 for {CANARY}-2") == "401 for ***"


# Put together here, so that nobody who scans this file for secrets finds one.
LETTERS = "aB3dE5gH7jK9mN1pQ3sT5vX7zA9cE2fG4iL6nP8rU0wY"
HEX = "0123456789abcdef" * 4
SHAPES = {
    "github": "ghp_" + LETTERS[:36],
    "github, fine": "github_pat_" + LETTERS[:22] + "_" + LETTERS,
    "openai": "sk-" + LETTERS,
    "openai, project": "sk-proj-" + LETTERS[:20] + "_" + LETTERS[:20],
    "anthropic": "sk-ant-api03-" + LETTERS + "-AA",
    "letters alone": "sk-" + "abcdefghijklmnopqrstuvwx",
    "hugging face": "hf_" + LETTERS[:34],
    "aws": "AKIA" + "ABCDEFGH" + "IJKLMNOP",
    "aws, session": "ASIA" + "ABCDEFGH" + "IJ234567",
    "slack, bot": "xoxb-" + "1234567890-" + LETTERS[:24],
    "slack, person": "xoxp-" + "1234567890-" + LETTERS[:24],
    "google": "AIza" + LETTERS[:35],
    "gitlab": "glpat-" + LETTERS[:20],
    "nvidia": "nvapi-" + LETTERS,
    "stripe": "sk_live_" + LETTERS[:24],
    "jwt": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + LETTERS[:43],
    "docker": "dckr_pat_" + LETTERS[:27],
    "databricks": "dapi" + HEX[:32],
    "google, secret of a client": "GOCSPX-" + LETTERS[:28],
    "gitlab, job": "glcbt-64_" + LETTERS[:20],
    "shopify": "shpat_" + HEX[:32],
    "langsmith": "lsv2_pt_" + HEX[:32] + "_" + LETTERS[:10],
    "vault": "hvs." + LETTERS[:40],
    "terraform": LETTERS[:14] + ".atlasv1." + LETTERS[:60],
    "telegram": "123456789:AA" + LETTERS[:33],
    "postman": "PMAK-" + HEX[:24] + "-" + HEX[:34],
    "grafana": "glsa_" + LETTERS[:32] + "_" + HEX[:8],
    "tavily": "tvly-dev-" + LETTERS[:32],
    "atlassian": "ATATT3" + "xFfGF0" + LETTERS,
    "mailgun": "key-" + HEX[:32],
    "twilio": "SK" + HEX[:32],
    "tailscale": "tskey-" + "auth-" + LETTERS[:24],
    "pulumi": "pul-" + HEX[:40],
    "rubygems": "rubygems_" + HEX[:48],
    "fireworks": "fw_" + LETTERS[:24],
    "airtable": "pat" + LETTERS[:14] + "." + HEX,
    "discord": "MT" + LETTERS[:24] + "." + "GabcDE" + "." + LETTERS[:38],
    "notion": "secret_" + LETTERS[:43],
    "openshift": "sha256~" + LETTERS[:43],
    "pem": "-----BEGIN RSA PRIVATE KEY-----\n" + LETTERS + "\n" + LETTERS
    + "==\n-----END RSA PRIVATE KEY-----",
}  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    "around", ["{}", "key={}", '"{}",', "see https://h/{}", "KEY_{}\n", "({})."]
)
def test_shapes(kind, around):
    secret = SHAPES[kind]
    assert redact(around.format(secret)) == around.format("***")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:pass@host:1/x", "http://***@host:1/x"),
        ("https://token@host and a@b", "https://***@host and a@b"),
        ("redis://:p/a@ss@host:6379/0", "redis://***@host:6379/0"),
        (f"Authorization: Bearer {CANARY}", "Authorization: Bearer ***"),
        (f"{{'Authorization': 'Bearer {CANARY}'}}", "{'Authorization': 'Bearer ***'}"),
        (f"authorization=Basic {LETTERS[:12]}", "authorization=Basic ***"),
        (f"-H 'x-api-key: {LETTERS}'", "-H 'x-api-key: ***'"),
        (f"bearer {LETTERS}", "bearer ***"),
        (f"aws_secret_access_key = {LETTERS[:40]}", "aws_secret_access_key = ***"),
        (f'"SecretAccessKey": "{LETTERS[:38]}/+"', '"SecretAccessKey": "***"'),
        ("https://h/x?a=1&api_key=abcdefgh&b=2", "https://h/x?a=1&api_key=***&b=2"),
        ("-----BEGIN PRIVATE KEY-----\\nMIIE", "***"),
        ("failed: PGPASSWORD=hunter2hunter2 psql", "failed: PGPASSWORD=*** psql"),
        (f"export OPENAI_API_KEY='{LETTERS[:20]}'", "export OPENAI_API_KEY='***'"),
        ("host=db password=hunter2hunter2 dbname=x", "host=db password=*** dbname=x"),
        ("connect(user='a', password='hunter2hunter2')", "connect(user='a', password='***')"),
        ("Server=db;Uid=sa;Pwd=hunter2hunter2;", "Server=db;Uid=sa;Pwd=***;"),
        (f"hooks.slack.com/services/T0/B0/{LETTERS[:24]}", "hooks.slack.com/services/***"),
    ],
)
def test_secrets_in_their_places(text, expected):
    assert redact(text) == expected


SECRET_FIELDS = [
    ('{"password": "hunter2"}', '{"password": "***"}'),
    ('{"passphrase":"correct horse battery"}', '{"passphrase":"***"}'),
    (json.dumps(json.dumps({"a_password": 'x"y\\z1'})), '"{\\"a_password\\": \\"***\\"}"'),
    ("password: Tr0ub4dor&3", "password: ***"),
    ("  db_password: 'hunter2'", "  db_password: '***'"),
    ('dbPassword = "hunter2"', 'dbPassword = "***"'),
    ('"accessToken":"abcdefgh"', '"accessToken":"***"'),
    ('{"token": "a1b2c3d4e5f6"}', '{"token": "***"}'),
    ("api_key => 'abcdef123'", "api_key => '***'"),
    ("login --password hunter2 --token=abcdefgh", "login --password *** --token=***"),
    ("['x', '--api-key', 'abcdefgh', 'y']", "['x', '--api-key', '***', 'y']"),
    ("curl -s https://h -u user:pass -v", "curl -s https://h -u user:*** -v"),
    ("mysql -u root -phunter2 db", "mysql -u root -p*** db"),
    ("sshpass -p hunter2 ssh h", "sshpass -p *** ssh h"),
    ("machine h login me password hunter2", "machine h login me password ***"),
    ("Set-Cookie: sid=abcdef0123456789; Path=/", "Set-Cookie: ***"),
    ("{'Cookie': 'session=abcdef0123'}", "{'Cookie': '***'}"),
    ("got Basic dXNlcjpwYXNz", "got Basic ***"),
    (r"{\"Authorization\": \"Bearer abcdefgh12\"}", r"{\"Authorization\": \"Bearer ***\"}"),
    ("(b'authorization', b'Bearer abcdef12')", "(b'authorization', b'Bearer ***')"),
    ("<password>hunter2x</password>", "<password>***</password>"),
    ("q=password%3Dhunter2&x", "q=password%3D***&x"),
    ("İ password: hunter2", "İ password: ***"),
    (
        f"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,0\n\n"
        f"{LETTERS}\n-----END RSA PRIVATE KEY----- and more",
        "*** and more",
    ),
    ("-----BEGIN PRIVATE KEY-----%0AMIIE", "***"),
]


@pytest.mark.parametrize(("text", "expected"), SECRET_FIELDS)
def test_secrets_by_the_names_of_their_fields(text, expected):
    assert redact(text) == expected


@pytest.mark.parametrize(
    "around", [r"a\n{}", "key%3D{}", r"\u0022{}\u0022", r"\x22{}\x22", "\x1b[31m{}\x1b[0m"]
)
def test_a_token_behind_an_escape(around):
    for kind in ("github", "aws", "slack, bot", "google"):
        assert redact(around.format(SHAPES[kind])) == around.format("***")


@pytest.mark.parametrize(
    "text",
    [
        "the password is a word, a token is not",
        "token_loss: spo",
        "max_tokens: 5 and max_new_tokens=81920 and token: 151643",
        '{"token": "hello", "logprob": -0.5}, ["password", "username"]',
        '{"password": {"type": "string"}, "api_key": "string"}',
        "pad_token: <|endoftext|>12 eos_token='<|im_end|>2'",
        "--token TOKEN --password <your password> --api-key $KEY; use --token to pass a token",
        "Her secret: she had 12345 cookies, each cookie = 3*4=12; cookies: 5 + 7 = 12",
        "Basic understanding of algebra, a login and a password",
        "pwd: /home/me/2024 credentials: include",
        "docker run -u 1000:1000 image",
        "api_key=None, token=None, password == 'x' or def password(n): return n*2",
        "the_secret_number = 42424242; The secret number: 7 * 8 = 56",
        "actor.token_stats=triton_fused2 tokenizer: qwen3_tokenizer_v2",
        "train@openai/gsm8k:main",
        "hf_model",
        "hf_hub_download_of_a_file",
        "sk-fading-circle-container",
        "a risk-adjusted-return-of-the-year",
        "the bearer of responsibilities",
        "the ring bearer and his antidisestablishmentarianism",
        "http://localhost:8000/@me and https://medium.com/@user/a-post",
        "https://example.com:443/x?y=a@b",
        "x = 3; y: int = 4; a@b; price=$18; 5*3=15 <<5*3=15>>15",
        "Her secret key: read the question twice.",
        "the key=value of a dict, ?q=1&page=2",
        "eyJ is how a JSON object begins in base64",
        "password=input('which one, of 8 letters?') and api_key=os.environ['KEY_1']",
        "TOKEN=next PAD_TOKEN=endoftext MAX_TOKENS=123456789 KEY=value password=correcthorse",
        "dp.softmax.of.the.scores, a dapi of 5, sbp_ and shp_files_of_2024",
        "AKIA" + "ABCDEFGHIJKLMNOPQRST",
        "A public key: -----BEGIN PUBLIC KEY-----",
    ],
)
def test_ordinary_text_stays(text):
    assert redact(text) == text


def test_real_questions_and_answers_stay():
    """Not one of 8,792 problems with its solution is changed, and that costs little."""
    files = sorted(REAL.glob("*.jsonl"))
    if not files:
        pytest.skip("the real GSM8K is not there")
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert len(rows) > 1000 and redact_all(rows) == rows


def test_a_large_text_takes_no_more_than_it_must():
    """Twice the text, twice the time: no shape looks for its end again and again."""
    for begin in (
        "-----BEGIN PRIVATE KEY-----",
        "://a:b",
        "eyJ",
        "sk-a",
        "Authorization: ",
        "?key=",
        "password=",
        "A_KEY=",
        "password: ",
        '"token": "',
        "--token ",
        "curl -u ",
        "cookie: ",
        "<password>",
    ):
        small, large = (_seconds(begin * n) for n in (2_000, 8_000))
        assert large < 12 * small + 0.2, begin


def _seconds(text):
    start = time.process_time()
    redact(text)
    return time.process_time() - start


def test_config(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    plain = {"a": [f"x{CANARY}", 3], "options": {"api_key": "anything", "n": None, "key": 4}}
    assert redact_config(plain) == {
        "a": ["x***", 3],
        "options": {"api_key": "***", "n": None, "key": 4},
    }


def test_log_lines_and_tracebacks(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    try:
        raise ValueError(CANARY)
    except ValueError:
        record = logging.LogRecord(
            "RL2", 20, "x.py", 1, "got %s", (CANARY,), exc_info=sys.exc_info()
        )
    text = RedactingFormatter("%(message)s").format(record)
    assert text.startswith("got ***\nTraceback") and CANARY not in text


def test_a_terminal_acts_on_nothing_that_is_logged():
    record = logging.LogRecord("RL2", 20, "x.py", 1, "a\tb\x1b]0;title\x07\x9b2J\rc", (), None)
    assert RedactingFormatter("%(message)s").format(record) == "a\tb\\x1b]0;title\\x07\\x9b2J\\x0dc"
    assert for_terminal("a\u202eb\u2066c\u2028d\x85e") == r"a\u202eb\u2066c\u2028d\x85e"
    assert for_terminal("日本 é עברית 👨\u200d👩") == "日本 é עברית 👨\u200d👩"
