"""Secrets that are known by their shape: tokens of well-known services, keys, passwords.

A text is searched for a shape only if it contains one of the shape's marks, so that a large dump
without secrets costs little. Shapes are narrow: what a model writes must stay as it is.
"""

import re

from RL2.runtime.secret_fields import without_fields

# Parts of an address. The password may hold a slash or an @; a port is not a password.
USER = r"[^\s/@:\"']{0,100}"
PASSWORD = r"(?!\d{1,5}(?:[/?#\s]|$))[^\s\"']{0,300}"

# Letters and digits before a token may end an escape: \\n, %3D, \\x22, \\u0022, terminal colours.
_ESCAPES = (
    r"\\[abfnrtv0]", r"%[0-9A-Fa-f]{2}", r"\\x[0-9A-Fa-f]{2}", r"\\u[0-9A-Fa-f]{4}",
    r"\[[01]m", r"\[\d\dm", r"\[\d;\d\dm",
)  # fmt: skip


def _shape(pattern: str) -> re.Pattern[str]:
    """The pattern of a token, which must not begin inside a word."""
    # The literal start comes first, as `re` searches for that fastest.
    literal = re.match(r"[A-Za-z0-9]*(?![?*+{])", pattern)[0]
    n = "." * len(literal)
    escapes = "".join(rf"|(?<={escape}{n})" for escape in _ESCAPES)
    return re.compile(
        f"{literal}(?:(?<![A-Za-z0-9]{n}){escapes}){pattern[len(literal) :]}", re.DOTALL
    )


_QUOTE = r"\\{0,8}[\"']"
_HEADER = (
    rf"(?:{_QUOTE})?(?:\s{{0,9}}[:=]\s{{0,9}}|(?<=[\"']),\s{{0,9}}(?=b?{_QUOTE}))b?(?:{_QUOTE})?"
)
# Marks and shape. The first group of a shape, if it has one, is not secret and stays.
_SHAPES: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = (
    (
        ("PRIVATE KEY",),
        re.compile(
            r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
            r"(?:(?:[^-]|-(?!----)){0,20000}+-----END [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
            r"|(?:[A-Za-z0-9+/=\s]|\\{1,8}(?:[nr]|u000[ad])|%0[AaDd])*+)"
        ),
    ),
    (("://",), re.compile(rf"(?<=://)(?:{USER}:{PASSWORD}|[^/\s@\"']{{1,300}})(?=@)")),
    (
        ("ey=", "EY=", "ken=", "KEN=", "ig=", "ignature=", "word=", "wd=", "ret="),
        re.compile(
            r"([?&](?:api_?key|key|(?:access_?|refresh_?|id_?|auth_?)?token|sig|signature|password"
            r"|passwd|pwd|client_secret|secret|X-Amz-Signature|X-Amz-Security-Token)=)"
            r"[^&\s\"'#<>]{8,}",
            re.I,
        ),
    ),
    (
        ("uthorization", "UTHORIZATION"),
        re.compile(
            rf"(authorization{_HEADER}(?:(?:bearer|basic|token|digest|apikey)\s+)?)[^\s\"',}}\\]{{6,}}",
            re.I,
        ),
    ),
    (
        ("earer", "EARER"),
        re.compile(r"(\bbearer\s+)(?=\S*\d|\S{24})[\w.~+/=-]{16,}", re.I),
    ),
    (
        ("-key", "-Key", "-KEY", "-token", "-Token", "-TOKEN"),
        re.compile(
            rf"(\b(?:x-)?(?:[a-z]+-)?(?:api-key|(?:auth|access|private|job)-token){_HEADER})"
            r"[^\s\"',}\\]{8,}",
            re.I,
        ),
    ),
    (
        ("ecret", "ECRET"),
        re.compile(
            r"((?:aws_?)?secret_?(?:access_?)?key(?:[\"']?\s*[:=,]\s*|\s+(?:is\s+)?)[\"']?)"
            r"[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])",
            re.I,
        ),
    ),
    (("AccountKey=", "SharedAccessKey="), re.compile(r"((?:Account|Access)Key=)[\w+/=]{20,}")),
    (("github_pat_",), _shape(r"github_pat_\w{20,}")),
    (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), _shape(r"gh[pousr]_\w{16,}")),
    (
        ("glpat-", "gldt-", "glrt-", "glptt-", "glcbt-", "glft-", "glagent-", "gloas-"),
        _shape(r"gl(?:pat|dt|rt|ptt|cbt|ft|agent|oas)-[\w.-]{16,}"),
    ),
    # Not hyphenated words, as in style sheets.
    (
        ("sk-",),
        _shape(r"sk-(?!(?:[a-z]{1,11}-)*[a-z]{1,11}(?![\w-]))[\w-]{16,}"),
    ),
    (("_live_", "_test_"), _shape(r"[srp]k_(?:live|test)_[A-Za-z0-9]{16,}")),
    (("hf_", "api_org_"), _shape(r"(?:hf|api_org)_[A-Za-z0-9]{16,}")),
    (("wandb_v1_",), _shape(r"wandb_v1_\w{16,}")),
    (("AKIA", "ASIA"), _shape(r"A(?:KIA|SIA)[A-Z0-9]{16}(?![A-Za-z0-9])")),
    (("xox", "xapp-"), _shape(r"(?:xox[a-z]|xapp)-[A-Za-z0-9-]{10,}")),
    (("hooks.slack.com/",), re.compile(r"(hooks\.slack\.com/(?:services|workflows)/)[\w/-]{8,}")),
    (("/api/webhooks/",), re.compile(r"(/api/webhooks/)\d+/[\w-]{8,}")),
    (("AIza",), _shape(r"AIza[\w-]{30,}")),
    (("ya29.",), _shape(r"ya29\.[\w-]{20,}")),
    (("nvapi-",), _shape(r"nvapi-[\w-]{16,}")),
    (("npm_",), _shape(r"npm_[A-Za-z0-9]{30,}")),
    (("pypi-",), _shape(r"pypi-[\w-]{40,}")),
    (("gsk_", "r8_", "xai-", "pplx-"), _shape(r"(?:gsk_|r8_|xai-|pplx-)[A-Za-z0-9]{20,}")),
    (("doo_v1_", "dop_v1_", "dor_v1_"), _shape(r"do[opr]_v1_[a-f0-9]{32,}")),
    (
        ("dckr_pat_", "dapi", "GOCSPX-", "whsec_", "tgp_v1_", "csk-", "lin_api_", "ntn_", "figd_"),
        _shape(
            r"(?:dckr_pat_[\w-]{20,}|dapi[a-f0-9]{32}|GOCSPX-[\w-]{20,}|whsec_[\w+/=]{24,}"
            r"|tgp_v1_[\w-]{20,}|csk-[A-Za-z0-9]{20,}|lin_api_\w{20,}|ntn_[A-Za-z0-9]{20,}"
            r"|figd_[\w-]{20,})"
        ),
    ),
    (
        ("shp", "sq0", "lsv2_", "pcsk_", "tvly-", "glsa_", "glc_", "sntrys_", "sbp_", "pscale_"),
        _shape(
            r"(?:shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}|sq0[a-z]{3}-[\w-]{20,}"
            r"|lsv2_(?:pt|sk)_[a-f0-9]{32}\w*|pcsk_\w{20,}|tvly-[\w-]{20,}"
            r"|glsa_\w{20,}|glc_[\w+/=]{20,}|sntry[su]_[\w+/=]{20,}|sbp_[a-f0-9]{32,}"
            r"|pscale_(?:tkn|pw|oauth)_[\w.-]{20,})"
        ),
    ),
    (
        ("hvs.", "hvb.", ".atlasv1.", "PMAK-", "NRAK-", "dp.", "AGE-SECRET-KEY-"),
        _shape(
            r"(?:hv[sb]\.[\w-]{20,}|[A-Za-z0-9]{14}\.atlasv1\.[\w-]{40,}"
            r"|PMAK-[a-f0-9]{24}-[a-f0-9]{34}|NRAK-[A-Z0-9]{27}|dp\.[a-z]{2,5}\.[\w.-]{40,}"
            r"|AGE-SECRET-KEY-1[A-Z0-9]{50,})"
        ),
    ),
    ((":AA",), _shape(r"\d{8,10}:AA[\w-]{32,35}(?![\w-])")),
    # A variable or a connection: PGPASSWORD=…, host=db password=…. A digit is required: in program
    # text, words and calls come after such names.
    (
        ("WORD=", "WD=", "PASS=", "CRET=", "KEN=", "KEY=", "word=", "wd=", "ase=", "key=", "cret="),
        re.compile(
            r"((?<![A-Za-z0-9_])(?:[A-Z][A-Z0-9_]{0,60})?(?:PASSWORD|PASSWD|_PASS|_PWD|SECRET|TOKEN"
            r"|API_?KEY|ACCESS_KEY|SECRET_KEY)=[\"']?"
            r"|(?<![\w-])(?:[Pp]ass(?:word|wd|phrase)|[Pp]wd|api_key|client_secret)=[\"']?)"
            r"(?=[^\s\"'&,;()<>{}]{0,200}\d)[^\s\"'&,;()<>{}]{8,}"
        ),
    ),
    (
        ("ATATT3", "ATCTT3", "ATBB", "nfp_", "HRKU-", "NRJS-", "NRII-", "fw_", "fo1_", "CFPAT-"),
        _shape(
            r"(?:AT[AC]TT3[\w=-]{20,}|ATBB[A-Za-z0-9]{20,}|nfp_[A-Za-z0-9]{30,}|HRKU-[\w-]{30,}"
            r"|NRJS-[a-f0-9]{19,}|NRII-[\w-]{30,}|fw_[A-Za-z0-9]{20,}|fo1_[\w-]{40,}|CFPAT-[\w-]{40,})"
        ),
    ),
    (
        ("pnu_", "pul-", "rdme_", "rubygems_", "shippo_", "tfp_", "sgp_", "tskey-", "ops_eyJ"),
        _shape(
            r"(?:pnu_[A-Za-z0-9]{30,}|pul-[a-f0-9]{40}|rdme_[a-z0-9]{60,}|rubygems_[a-f0-9]{40,}"
            r"|shippo_(?:live|test)_[a-f0-9]{30,}|tfp_[\w.=-]{50,}|sgp_\w{30,}"
            r"|tskey-[a-z]{2,10}-[\w-]{16,}|ops_eyJ[\w=-]{40,})"
        ),
    ),
    (
        ("xkeysib-", "key-", "-us", "sb_secret_", "vcp_", "secret_", "sess-", "ABSK", "AKCp"),
        _shape(
            r"(?:xkeysib-[a-f0-9]{40,}[\w-]*|key-[a-f0-9]{32}(?![a-f0-9])|[a-f0-9]{32}-us\d{1,2}"
            r"|sb_secret_[\w-]{20,}|vcp_[A-Za-z0-9]{20,}|secret_[A-Za-z0-9]{40,}"
            r"|sess-[A-Za-z0-9]{30,}|ABSK[A-Za-z0-9+/=]{60,}|AKCp[A-Za-z0-9]{60,})"
        ),
    ),
    (
        ("dt0c01.", "LTAI", "AKID", "sha256~", "8Q~", "FLWSECK", "EZAK", "EAAC", "fio-u-", "live_"),
        _shape(
            r"(?:dt0c01\.[A-Z0-9]{20,}\.[A-Z0-9]{40,}|LTAI[A-Za-z0-9]{17,24}(?![A-Za-z0-9])"
            r"|AKID[A-Za-z0-9]{32}(?![A-Za-z0-9])|sha256~[\w-]{40,}|[\w~.]{3}8Q~[\w~.-]{31,}"
            r"|FLWSECK(?:_TEST)?-[\w-]{20,}|EZAK[A-Za-z0-9]{50,}|EAAC[A-Za-z0-9]{60,}"
            r"|fio-u-[\w=-]{60,}|live_[A-Za-z0-9]{35,})"
        ),
    ),
    (("pat",), _shape(r"pat[A-Za-z0-9]{14}\.[a-f0-9]{60,}")),
    (("SK",), _shape(r"SK[a-f0-9]{32}(?![A-Za-z0-9])")),
    (("webhook.office.com/",), re.compile(r"(webhook\.office\.com/\w{1,20}/)[\w@/-]{20,}")),
    (("sl.",), _shape(r"sl\.(?:u\.)?[\w-]{100,}")),
    # A bot's token: number, time and signature.
    (
        (".",),
        re.compile(r"[MNO](?<![A-Za-z0-9].)[A-Za-z0-9]{23,27}\.[\w-]{6}\.[\w-]{27,40}(?![\w-])"),
    ),
    (("SG.",), _shape(r"SG\.[\w-]{16,}\.[\w-]{16,}")),
    (("eyJ",), _shape(r"eyJ[\w-]{10,2000}\.[\w-]{10,9999}\.[\w-]*(?:\.[\w-]+)*")),
)


def without_shapes(text: str, hidden: str) -> str:
    """`text` with `hidden` in place of everything that looks like a secret."""
    for marks, shape in _SHAPES:
        if any(mark in text for mark in marks):
            keeps = rf"\g<1>{hidden}" if shape.groups else hidden
            text = shape.sub(keeps, text)
    return without_fields(text, hidden)
